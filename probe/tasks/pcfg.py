"""PCFG SET: nested edits of strings in prefix notation. Hupkes et al. 2020, section 3 and table 1.

The whole language::

    phrase   = unary phrase | binary phrase "," phrase | string
    string   = one symbol or more, A1 … Z20 (in drawn sources two to five)

The published corpus draws from probabilities fitted to English syntax trees; here every function of an arity is as
likely as the others.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from probe.errors import ProbeError
from probe.tasks.base import GeneratedTask, Task, Vocabulary

Words = tuple[str, ...]
UNARY: dict[str, Callable[[Words], Words]] = {
    "copy": lambda x: x,
    "reverse": lambda x: x[::-1],
    "shift": lambda x: (*x[1:], x[0]),
    "swap_first_last": lambda x: (x[-1], *x[1:-1], x[0]) if len(x) > 1 else x,
    "repeat": lambda x: x + x,
    "echo": lambda x: (*x, x[-1]),
}
BINARY: dict[str, Callable[[Words, Words], Words]] = {
    "append": lambda x, y: x + y,
    "prepend": lambda x, y: y + x,
    "remove_first": lambda x, y: y,
    "remove_second": lambda x, y: x,
}
ALPHABET = tuple(f"{letter}{i}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for i in range(1, 21))
COMMA = ","
_SYMBOLS = frozenset(ALPHABET)


def interpret(command: str) -> str:
    """The string that a command stands for: ``"shift prepend K10 R1 K12 , E12 F16"`` -> ``"F16 K10 R1 K12 E12"``.

    Raises:
        ProbeError: where the command is not of the language; it says which part is no phrase.
    """
    words = command.split()
    waiting: list[tuple[int, Words]] = []  # what stands to the right, the nearest last: where it begins, and its value

    def refuse(start: int, stop: int | None = None) -> ProbeError:
        part = " ".join(words[start:stop])
        return ProbeError(f"a PCFG command was wanted, got {command!r}: {part!r} is no phrase of the language")

    # From right to left, so that arguments are there before their function.
    for i in reversed(range(len(words))):
        word, nearest = words[i], waiting[-1][1] if waiting else ()
        if word in _SYMBOLS:
            # A symbol before another is of the same string.
            if i + 1 < len(words) and words[i + 1] in _SYMBOLS:
                waiting[-1] = (i, (word, *nearest))
            else:
                waiting.append((i, (word,)))
        elif word == COMMA and nearest and nearest != (COMMA,):
            waiting.append((i, (COMMA,)))
        elif word in UNARY and nearest and nearest != (COMMA,):
            waiting[-1] = (i, UNARY[word](nearest))
        elif word in BINARY and len(waiting) > 2 and nearest != (COMMA,) and waiting[-2][1] == (COMMA,):
            waiting[-3:] = [(i, BINARY[word](nearest, waiting[-3][1]))]
        else:
            raise refuse(i, None if word in (*UNARY, *BINARY, COMMA) else i + 1)
    if len(waiting) != 1:
        raise refuse(0 if not waiting or waiting[-1][1] == (COMMA,) else waiting[-2][0])
    return " ".join(waiting[0][1])


@dataclass(frozen=True)
class Pcfg(GeneratedTask):
    """PCFG SET, trained to ``train_length`` and tested beyond it. ``split`` says what is counted:

    - ``productivity``: functions, in all. Hupkes et al. and Kazemnejad et al. train on at most 8 and test on 9 to 35.
    - ``md_productivity``: functions within each other, at most, that is the depth of the tree. The published accuracies
      of that name say nothing of how it was split, and file them by functions in all, 9 to 35 too; depth is our
      reading, so they are not to be compared length by length.

    Six functions have one argument, four have two; the former are drawn with six tenths. Of the functions that remain
    (``productivity``) each argument gets a share drawn evenly; one argument gets the whole depth that remains
    (``md_productivity``), the other is as deep as a geometric draw of mean 1. Strings have two to five symbols. No
    value, inner ones included, is longer than ``longest``: a function that would exceed it (repeat, echo, append,
    prepend) is drawn again among those of its arity that do not.
    """

    longer_only = True

    train_length: int = 8
    test_length: int = 16
    split: Literal["productivity", "md_productivity"] = "productivity"
    longest: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longest < 5:
            raise ProbeError(f"longest of task 'pcfg' must be at least 5, as strings are, got {self.longest}")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary((*UNARY, *BINARY, COMMA, *ALPHABET))

    def source(self, length: int, rng: np.random.Generator) -> tuple[str, ...]:
        words: list[str] = []
        self._phrase(length, words, _uniform(rng))
        return tuple(words)

    def target(self, source: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(interpret(" ".join(source)).split())

    def _phrase(self, length: int, words: list[str], uniform: Iterator[float]) -> int:
        """Write a phrase of that length; returns the length of its value."""
        if length == 0:
            n = 2 + int(4 * next(uniform))
            words += [ALPHABET[int(len(ALPHABET) * next(uniform))] for _ in range(n)]
            return n
        at = len(words)
        words.append("")  # the function, chosen when the lengths of its arguments are known
        if next(uniform) < len(UNARY) / (len(UNARY) + len(BINARY)):
            n = self._phrase(length - 1, words, uniform)
            lengths = {name: n for name in UNARY} | {"repeat": 2 * n, "echo": n + 1}
        else:
            first, second = self._share(length - 1, uniform)
            x = self._phrase(first, words, uniform)
            words.append(COMMA)
            y = self._phrase(second, words, uniform)
            lengths = {"append": x + y, "prepend": x + y, "remove_first": y, "remove_second": x}
        fitting = [name for name, n in lengths.items() if n <= self.longest]
        words[at] = fitting[int(len(fitting) * next(uniform))]
        return lengths[words[at]]

    def _share(self, length: int, uniform: Iterator[float]) -> tuple[int, int]:
        """What of a length goes to the two arguments."""
        if self.split == "productivity":
            first = int((length + 1) * next(uniform))
            return first, length - first
        shallow = 0
        while shallow < length and next(uniform) < 0.5:
            shallow += 1
        return (length, shallow) if next(uniform) < 0.5 else (shallow, length)


def _uniform(rng: np.random.Generator) -> Iterator[float]:
    """Numbers in [0, 1), one by one, drawn many at a time."""
    while True:
        yield from rng.random(64).tolist()


TASKS: dict[str, type[Task]] = {"pcfg": Pcfg}
