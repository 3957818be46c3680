"""Sorting: Kazemnejad et al. 2023, appendix D. Trained on 8 numbers, tested on 16."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from probe.errors import ProbeError
from probe.tasks.base import Task
from probe.tasks.scratchpad import Step, SteppedTask, join_with, number, split_at

Words = tuple[str, ...]
DIGITS = tuple("0123456789")
ORDER = (*DIGITS, *"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True)
class Sorting(SteppedTask):
    """Sort ``length`` numbers. ``variant``: ``single``, one token each, from the fixed order 0…9 A…Z a…z, of which the
    first ``n_symbols`` are used; ``multi``, numbers 10…9999, their digits separated and a comma between numbers.

    ``Sort the following numbers : 3 1 4 1 5 ?`` -> ``The answer is 1 1 3 4 5 .``
    A step of the scratchpad finds the least of what remains, and the first of it takes the place of the least:
    ``>> 3 :: min ( 3 , 1 ) == 1 @ sorted = 1 => 3 4 1 5``. The computation compares the first with the least of the
    others, and names the last one alone.
    """

    asked = ("Sort the following numbers :", "?")
    step_words = ("min", "(", ",", ")", "sorted", "=")

    variant: Literal["single", "multi"] = "single"
    n_symbols: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_symbols > len(ORDER):
            raise ProbeError(f"n_symbols must be at most {len(ORDER)}, got {self.n_symbols}")

    @property
    def words(self) -> Words:
        return ORDER[: self.n_symbols] if self.variant == "single" else (*DIGITS, ",")

    @cached_property
    def _rank(self) -> dict[str, int]:
        return {symbol: i for i, symbol in enumerate(ORDER[: self.n_symbols])}

    def question(self, length: int, rng: np.random.Generator) -> Words:
        if self.variant == "single":
            return tuple(ORDER[i] for i in rng.integers(self.n_symbols, size=length).tolist())
        return join_with(",", [str(i) for i in rng.integers(10, 10_000, size=length).tolist()])

    def answer(self, question: Words) -> Words:
        return self._text(sorted(self._items(question), key=self._key))

    def start(self, question: Words) -> Step:
        return Step(variables=("sorted", "="), remaining=question)

    def follow(self, question: Words, before: Step) -> Step | None:
        if not before.remaining:
            return None
        if before.variables[:2] != ("sorted", "="):
            raise ProbeError(f"'sorted = …' was wanted, got {' '.join(before.variables)!r}")
        first, *others = self._items(before.remaining)
        least = min((first, *others), key=self._key)
        rival = min(others, key=self._key) if others else ()
        if least != first:
            others[others.index(least)] = first
        return Step(
            input=first,
            computation=("min", "(", *first, *((",", *rival) if rival else ()), ")"),
            output=least,
            variables=("sorted", "=", *self._text([*self._items(before.variables[2:]), least])),
            remaining=self._text(others),
        )

    def conclude(self, steps: Sequence[Step]) -> Words:
        return steps[-1].variables[2:]

    def _items(self, words: Words) -> list[Words]:
        return [(word,) for word in words] if self.variant == "single" else split_at(words, ",")

    def _text(self, items: Sequence[Words]) -> Words:
        return join_with(",", items) if self.variant == "multi" else tuple(word for item in items for word in item)

    def _key(self, item: Words) -> int:
        if self.variant == "multi" and item:
            return int("".join(str(number(digit)) for digit in item))
        if len(item) != 1 or item[0] not in self._rank:
            raise ProbeError(f"a number was wanted, got {' '.join(item)!r}")
        return self._rank[item[0]]


TASKS: dict[str, type[Task]] = {"sorting": Sorting}
