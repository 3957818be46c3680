"""LEGO: a chain of assignments of signs, to be followed to one variable. Zhang et al. 2022; Kazemnejad et al. 2023."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from typing import Literal

import numpy as np

from probe.errors import ProbeError
from probe.tasks.base import Task
from probe.tasks.scratchpad import Step, SteppedTask, Words, join_with, split_at

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Lego(SteppedTask):
    """A chain of ``length`` clauses: a first variable is +1 or −1, every other is plus or minus the one before it, and
    one of the latter half is asked for, as in the published data. ``order``: the clauses stand in the chain's order
    (``ordered``) or shuffled (``permuted``). Trained on 8 clauses, tested on 16.

    ``If a = -1 ; b = -a ; c = +b ; d = +c . Then what is c ?`` -> ``The answer is +1 .``
    A step of the scratchpad gives a variable its value, from the first to the one asked for:
    ``>> b = -a :: -a = - -1 == +1 @ b = +1 => c = +b ; d = +c``.

    Variables are the 26 letters, and a1, b1, … where a question or ``test_length`` needs more; the vocabulary has at
    least 104 of them, each bare and with either sign.
    """

    asked = ("If", "Then what is", "?")
    cuts = (-1,)
    step_words = ("+", "-")

    order: Literal["ordered", "permuted"] = "ordered"

    @cached_property
    def names(self) -> tuple[str, ...]:
        endless = (f"{letter}{i or ''}" for i in count() for letter in LETTERS)
        return tuple(islice(endless, max(104, self.test_length)))

    @property
    def words(self) -> Words:
        return (*self.names, *(sign + name for sign in "+-" for name in (*self.names, "1")), "=", ";", ".")

    def question(self, length: int, rng: np.random.Generator) -> Words:
        if length > len(self.names):
            raise ProbeError(f"a question of at most {len(self.names)} clauses was wanted, got {length}")
        pool = max(len(LETTERS), self.test_length, length)
        names = [self.names[i] for i in rng.permutation(pool)[:length].tolist()]
        signs = rng.integers(2, size=length).tolist()
        clauses = [
            (name, "=", "+-"[sign] + before) for name, sign, before in zip(names, signs, ("1", *names), strict=False)
        ]
        asked = names[int(rng.integers(length // 2, length))]
        if self.order == "permuted":
            clauses = [clauses[i] for i in rng.permutation(length).tolist()]
        return (*join_with(";", clauses), ".", asked)

    def answer(self, question: Words) -> Words:
        clauses = {name: value for name, _, value in split_at(question[:-2], ";")}
        value = clauses[question[-1]]
        negative = value[0] == "-"
        while value[1:] != "1":
            value = clauses[value[1:]]
            negative ^= value[0] == "-"
        return ("-1" if negative else "+1",)

    def start(self, question: Words) -> Step:
        return Step(remaining=question[:-2])

    def follow(self, question: Words, before: Step) -> Step | None:
        known, value = _assignment(before.variables) if before.variables else ("1", "+1")
        if known == question[-1]:
            return None
        clauses = split_at(before.remaining, ";")
        clause = next((c for c in clauses if _assignment(c)[1][1:] == known), None)
        if clause is None or value not in ("+1", "-1"):
            raise ProbeError(f"a clause that follows from '{known} = {value}' was wanted, got none")
        name, said = clause[0], clause[2]
        found = "+1" if said[0] == value[0] else "-1"
        return Step(
            input=clause,
            computation=(said, "=", said[0], value),
            output=(found,),
            variables=(name, "=", found),
            remaining=join_with(";", [c for c in clauses if c != clause]),
        )

    def conclude(self, steps: Sequence[Step]) -> Words:
        return steps[-1].output


def _assignment(clause: tuple[str, ...]) -> tuple[str, str]:
    if len(clause) != 3 or clause[1] != "=" or clause[2][:1] not in ("+", "-"):
        raise ProbeError(f"a clause 'name = +other' was wanted, got {' '.join(clause)!r}")
    return clause[0], clause[2]


TASKS: dict[str, type[Task]] = {"lego": Lego}
