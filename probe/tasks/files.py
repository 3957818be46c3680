"""A user's own examples, from a file of JSON lines."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from probe.config import MOST_SIZE
from probe.errors import ProbeError, unknown_name
from probe.files import check_json_size, open_plain
from probe.tasks.base import SHARES, SPECIALS, Example, Splits, Task, Vocabulary, split_of


@dataclass(frozen=True)
class Jsonl(Task):
    """The examples of the file ``path``, a JSON object a line; blank lines are skipped::

        {"source": "jump twice", "target": ["JUMP", "JUMP"], "length": 2, "split": "test"}

    ``source`` and ``target`` are lists of words, or texts that are split at blanks; ``length`` is a positive integer,
    of whatever is counted. ``split`` (train, validation or test) may be left out: then an example longer than
    ``train_length`` is tested on, and of the others the hash of the source makes eight tenths train, one validation,
    one test. Other keys are ignored. A source may stand in the file again only with the same target and split.
    """

    path: str = ""
    train_length: int = 20

    @cached_property
    def examples(self) -> dict[str, list[Example]]:
        """All of the file, by split.

        Raises:
            ProbeError: where a line cannot be used; it says which.
        """
        try:
            with open_plain(self.path) as file:
                lines = file.read().splitlines()
        except OSError as error:
            raise ProbeError(f"{self.path}: {error.strerror or error}") from None
        found: dict[str, list[Example]] = {split: [] for split in SHARES}
        seen: dict[tuple[str, ...], tuple[str, Example, int]] = {}
        for i, line in enumerate(lines, 1):
            if not line.strip():
                continue
            example, split = self._read(line, f"{self.path}, line {i}")
            *before, at = seen.setdefault(example.source, (split, example, i))
            if before != [split, example]:
                raise ProbeError(
                    f"{self.path}, line {i}: the source of line {at}, with another target, length or split"
                )
            if at == i:
                found[split].append(example)
        if not seen:
            raise ProbeError(f"{self.path}: at least one example was wanted, got none")
        return found

    def _read(self, line: bytes, where: str) -> tuple[Example, str]:
        check_json_size(line, where)
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            raise ProbeError(
                f"{where}: a JSON object was wanted, got {_short(line.decode(errors='replace'))}"
            ) from None
        if not isinstance(values, dict):
            raise ProbeError(f"{where}: a JSON object was wanted, got {_short(values)}")
        for key in ("source", "target", "length"):
            if key not in values:
                raise ProbeError(f"{where}: {key!r} is missing")
        length = values["length"]
        if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= MOST_SIZE:
            raise ProbeError(f"{where}: length must be a positive integer, got {_short(length)}")
        source, target = (_words(values[key], f"{where}: {key}") for key in ("source", "target"))
        if not source:
            raise ProbeError(f"{where}: source must have at least one word, got none")
        split = values.get("split", "test" if length > self.train_length else split_of(source))
        if split not in list(SHARES):
            raise unknown_name(f"split in {where}:", split, SHARES)
        return Example(source, target, length), split

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """All words of the file, sorted."""
        everything = (example for split in self.examples.values() for example in split)
        return Vocabulary(sorted({word for example in everything for word in (*example.source, *example.target)}))

    def splits(self, *, n_train: int, n_validation: int, n_test: int, seed: int = 0) -> Splits:
        """Of each split as many as there are, in an order drawn by ``seed``."""
        rng = np.random.default_rng(seed)
        wanted = {"train": n_train, "validation": n_validation, "test": n_test}
        drawn = {
            split: [self.examples[split][i] for i in rng.permutation(len(self.examples[split]))[:n]]
            for split, n in wanted.items()
        }
        if n_train and not drawn["train"]:
            raise ProbeError(
                f"{self.path}: an example to train on was wanted, of length 1…{self.train_length}, got none"
            )
        return Splits(**drawn)


def _words(value: Any, what: str) -> tuple[str, ...]:
    words: Sequence[Any] = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or any(not isinstance(word, str) or not word for word in words):
        raise ProbeError(f"{what} must be a text or a list of words, got {_short(value)}")
    for word in words:
        if word in SPECIALS:
            raise ProbeError(f"{what} must do without the special token {word!r}")
        if not word.isascii() and any(0xD800 <= ord(letter) <= 0xDFFF for letter in word):
            raise ProbeError(f"{what} must be Unicode text, got {_short(word)}")
    return tuple(words)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


TASKS: dict[str, type[Task]] = {"jsonl": Jsonl}
