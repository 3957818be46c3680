"""What a task is: examples over a small vocabulary, split into train, validation and test that share nothing."""

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from probe.errors import ProbeError, unknown_name

PAD, BOS, SEP, EOS = "<pad>", "<bos>", "<sep>", "<eos>"
SPECIALS = (PAD, BOS, SEP, EOS)


@dataclass(frozen=True)
class Example:
    """A source, its target, and the length that the task counts (symbols, or SCAN's actions)."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    length: int


@dataclass(frozen=True)
class Splits:
    """No example stands in two of the three. ``train`` and ``validation`` are of the trained lengths (in
    distribution); ``test`` holds what the task tests, longer inputs among it."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


class Vocabulary:
    """Token strings and their ids; the special tokens come first, ``<pad>`` is 0."""

    def __init__(self, words: Iterable[str]):
        self.tokens: tuple[str, ...] = (*SPECIALS, *words)
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            raise ProbeError("a vocabulary's words must differ from each other and from the special tokens")

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, tokens: Iterable[str]) -> list[int]:
        try:
            return [self.ids[token] for token in tokens]
        except KeyError as error:
            raise ProbeError(f"token {error.args[0]!r} is not in the vocabulary of {len(self)} tokens") from None

    def decode(self, ids: Iterable[int]) -> list[str]:
        return [self.tokens[i] for i in ids]

    def prompt(self, example: Example) -> list[int]:
        """``<bos>`` source ``<sep>``."""
        return self.encode((BOS, *example.source, SEP))

    def completion(self, example: Example) -> list[int]:
        """target ``<eos>``: the tokens that are learned and scored."""
        return self.encode((*example.target, EOS))


@dataclass(frozen=True)
class Task(ABC):
    """A task with its options as dataclass fields; ``train_length`` is the longest that is trained on."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ProbeError(
                    f"{f.name} of task {type(self).__name__.lower()!r} must be a positive integer, got {value!r}"
                )

    @property
    @abstractmethod
    def vocabulary(self) -> Vocabulary: ...

    @abstractmethod
    def splits(self, *, n_train: int, n_validation: int, n_test: int, seed: int = 0) -> Splits:
        """At most so many examples of each kind, distinct, the same for the same seed."""


@dataclass(frozen=True)
class GeneratedTask(Task):
    """A task whose examples are drawn. Lengths are uniform in 1…train_length for training and validation and in
    1…test_length for the test.

    An example's split is a function of its source (a hash, eight tenths train, one validation, one test), so the
    splits cannot overlap, whatever is drawn and in whatever order. Where a length has few distinct sources, as the
    shortest ones have, its share is smaller.
    """

    train_length: int = 20
    test_length: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test_length < self.train_length:
            raise ProbeError(f"test_length ({self.test_length}) must be at least train_length ({self.train_length})")

    @abstractmethod
    def draw(self, length: int, rng: np.random.Generator) -> Example:
        """One example of that length."""

    def splits(self, *, n_train, n_validation, n_test, seed=0):
        return Splits(
            train=self._draw("train", n_train, self.train_length, seed),
            validation=self._draw("validation", n_validation, self.train_length, seed),
            test=self._draw("test", n_test, self.test_length, seed),
        )

    def _draw(self, split: str, n: int, longest: int, seed: int) -> list[Example]:
        rng = np.random.default_rng([seed, *split.encode()])
        found: dict[tuple[str, ...], Example] = {}
        misses = 0
        while len(found) < n:
            example = self.draw(int(rng.integers(1, longest + 1)), rng)
            if split_of(example.source) == split and example.source not in found:
                found[example.source] = example
                misses = 0
            elif (misses := misses + 1) > 10_000:
                raise ProbeError(
                    f"{n} {split} examples were wanted, but lengths 1…{longest} seem to hold only "
                    f"{len(found)} distinct ones"
                )
        return list(found.values())


def split_of(source: Sequence[str]) -> str:
    """The split to which a drawn source belongs, whoever draws it."""
    tenth = int.from_bytes(hashlib.blake2b("\0".join(source).encode(), digest_size=8).digest()) % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def make_task(name: str, options: dict | None = None) -> Task:
    """The task of that name; an unknown name or option is refused."""
    from probe.tasks import TASKS

    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    known = [f.name for f in dataclasses.fields(TASKS[name])]
    for option in options or {}:
        if option not in known:
            raise unknown_name(f"option of task {name!r}:", option, known)
    return TASKS[name](**(options or {}))
