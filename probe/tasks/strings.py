"""Copy and reverse: strings over a small alphabet, repeated as they are or backwards.

Kazemnejad et al. 2023, section 4 and appendix D: trained to length 20, tested to 40.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np

from probe.errors import ProbeError
from probe.tasks.base import PromptedTask, Task

Words = tuple[str, ...]
NEXT = "[NEXT]"  # between the two halves of an answer that says two strings


def _random(symbols: Words, length: int, rng: np.random.Generator) -> Words:
    return tuple(symbols[i] for i in rng.integers(len(symbols), size=length).tolist())


def _repeated(symbols: Words, length: int, rng: np.random.Generator) -> Words:
    return (symbols[int(rng.integers(len(symbols)))],) * length


def _replaced(symbols: Words, length: int, rng: np.random.Generator) -> Words:
    old, new = rng.choice(len(symbols), size=2, replace=False).tolist()
    return (symbols[old], symbols[new], *(symbols[old],) * length)


# How each variant draws its question and answers it.
Variant = tuple[Callable[[Words, int, np.random.Generator], Words], Callable[[Words], Words]]
COPIES: dict[str, Variant] = {
    "rsc": (_repeated, lambda string: string),
    "rsc2x": (_repeated, lambda string: string * 2),
    "rdc": (_replaced, lambda question: (question[1],) * (len(question) - 2)),
    "cmc": (_random, lambda string: string),
    "cmc2x": (_random, lambda string: (*string, NEXT, *string)),
}
REVERSALS: dict[str, Variant] = {
    "mc": (_random, lambda string: string[::-1]),
    "mc2x": (_random, lambda string: (*string[::-1], NEXT, *string[::-1])),
    "mcrv": (_random, lambda string: (*string[::-1], NEXT, *string)),
}


@dataclass(frozen=True)
class _Strings(PromptedTask):
    """A string of symbols; its length is theirs. Constant words (``prompt``) are off by default."""

    variants: ClassVar[dict[str, Variant]]
    told = ("", "")

    prompt: bool = False
    n_symbols: int = 26

    @property
    @abstractmethod
    def variant(self) -> str:
        """One of ``variants``."""

    @cached_property
    def symbols(self) -> Words:
        letters = "abcdefghijklmnopqrstuvwxyz"
        return tuple(letters[: self.n_symbols] if self.n_symbols <= 26 else (f"s{i}" for i in range(self.n_symbols)))

    @property
    def words(self) -> Words:
        return (*self.symbols, NEXT) if self.variant in ("cmc2x", "mc2x", "mcrv") else self.symbols

    def question(self, length: int, rng: np.random.Generator) -> Words:
        return self.variants[self.variant][0](self.symbols, length, rng)

    def answer(self, question: Words) -> Words:
        return self.variants[self.variant][1](question)


@dataclass(frozen=True)
class Copy(_Strings):
    """Repeat a string of symbols. ``variant``, by the names of the published splits:

    - ``cmc``: random symbols. ``cmc2x``: the answer says them twice, ``[NEXT]`` between.
    - ``rsc``: one symbol again and again. ``rsc2x``: the answer has it twice as often.
    - ``rdc``: one symbol again and again, to be replaced by another. The bare source is the symbol, its replacement,
      and then the string, which alone is counted.

    ``rsc`` and ``rsc2x`` have no more sources than symbols times lengths: 520 to length 20.
    With ``prompt`` (off by default): ``Copy the following words : a b c .`` or ``Replace a with b in : a a a .``
    """

    variants = COPIES

    variant: Literal["rsc", "rsc2x", "rdc", "cmc", "cmc2x"] = "cmc"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant == "rdc" and self.n_symbols < 2:
            raise ProbeError(f"n_symbols must be at least 2 to replace one by another (rdc), got {self.n_symbols}")

    @property
    def asked(self) -> Words:
        return ("Replace", "with", "in :", ".") if self.variant == "rdc" else ("Copy the following words :", ".")

    @property
    def cuts(self) -> tuple[int, ...]:
        return (1, 2) if self.variant == "rdc" else ()


@dataclass(frozen=True)
class Reverse(_Strings):
    """Repeat a string of random symbols backwards. ``variant``, by the names of the published splits: ``mc`` once,
    ``mc2x`` twice, ``mcrv`` backwards and then forwards, the two with ``[NEXT]`` between.

    With ``prompt`` (off by default): ``Reverse the following words : a b c .``
    """

    variants = REVERSALS
    asked = ("Reverse the following words :", ".")

    variant: Literal["mc", "mc2x", "mcrv"] = "mc"


TASKS: dict[str, type[Task]] = {"copy": Copy, "reverse": Reverse}
