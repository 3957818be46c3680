"""Copy and reverse: random strings over a small alphabet, repeated as they are or backwards.

Kazemnejad et al. 2023, section 4 and appendix D: trained to length 20, tested to 40.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from probe.tasks.base import Example, GeneratedTask, Task, Vocabulary


@dataclass(frozen=True)
class Copy(GeneratedTask):
    """Repeat a string of random symbols."""

    n_symbols: int = 26

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        letters = "abcdefghijklmnopqrstuvwxyz"
        return (
            tuple(letters[: self.n_symbols]) if self.n_symbols <= 26 else tuple(f"s{i}" for i in range(self.n_symbols))
        )

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.symbols)

    def draw(self, length: int, rng: np.random.Generator) -> Example:
        source = tuple(self.symbols[i] for i in rng.integers(self.n_symbols, size=length).tolist())
        return Example(source, self.answer(source), length)

    def answer(self, source: tuple[str, ...]) -> tuple[str, ...]:
        return source


@dataclass(frozen=True)
class Reverse(Copy):
    """Repeat a string of random symbols backwards."""

    def answer(self, source: tuple[str, ...]) -> tuple[str, ...]:
        return source[::-1]


TASKS: dict[str, type[Task]] = {"copy": Copy, "reverse": Reverse}
