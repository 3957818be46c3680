"""What a task is: examples over a small vocabulary, split into train, validation and test that share nothing."""

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from probe.config import check_name, check_size
from probe.errors import ProbeError
from probe.tasks.options import check_options

PAD, BOS, SEP, EOS = "<pad>", "<bos>", "<sep>", "<eos>"
SPECIALS = (PAD, BOS, SEP, EOS)
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}  # of all sources, by their hash


@dataclass(frozen=True)
class Example:
    """A source, its target, and the length that the task counts (symbols, digits, clauses, SCAN's actions …)."""

    source: tuple[str, ...]  #: what is given
    target: tuple[str, ...]  #: what is to be said
    length: int  #: as the task counts
    ends: bool = True  #: whether the target is all there is to say; a piece of a longer text goes on


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

    @property
    def stop(self) -> int:
        """The id at which a model has said all."""
        return self.ids[EOS]

    @property
    def wanted(self) -> str:
        """How many tokens a model of it has, in words."""
        return f"{len(self)} tokens"

    def fits(self, d_vocab: int) -> bool:
        """Whether a model of so many tokens can be one of it."""
        return d_vocab == len(self)

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """The ids of tokens.

        Raises:
            ProbeError: for a token that is not in the vocabulary.
        """
        try:
            return [self.ids[token] for token in tokens]
        except KeyError as error:
            raise ProbeError(f"token {error.args[0]!r} is not in the vocabulary of {len(self)} tokens") from None

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The tokens of ids."""
        return [self.tokens[i] for i in ids]

    def prompt(self, example: Example) -> list[int]:
        """``<bos>`` source ``<sep>``."""
        return self.encode((BOS, *example.source, SEP))

    def completion(self, example: Example) -> list[int]:
        """target ``<eos>``, which is left out where the target does not end: the tokens that are learned and scored."""
        return self.encode((*example.target, EOS) if example.ends else example.target)


@dataclass(frozen=True)
class Task(ABC):
    """A task with its options as dataclass fields; ``train_length`` is the longest that is trained on."""

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in check_options(type(self), values).items():
            object.__setattr__(self, name, value)

    @property
    @abstractmethod
    def train_length(self) -> int:
        """The longest length that is trained on."""

    @property
    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """The tokens of sources and targets."""

    @abstractmethod
    def splits(self, *, n_train: int, n_validation: int, n_test: int, seed: int = 0) -> Splits:
        """At most so many examples of each kind, distinct, the same for the same seed."""

    def looked_at(self, length: int, n: int, seed: int) -> list[Example]:
        """Up to n held-out examples of so many tokens, for tasks that have better ones to look inside a model than the
        beginnings of their test examples; none otherwise."""
        return []

    def split_completion(self, tokens: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The scratchpad and the answer of a completion, a model's too; without a scratchpad all of it is answer."""
        return (), tuple(tokens)


@dataclass(frozen=True)
class GeneratedTask(Task):
    """A task whose examples are drawn. Lengths are uniform in 1…train_length for training and validation and in
    1…test_length for the test, or in train_length + 1…test_length where ``longer_only``.

    An example's split is a function of its source (a hash, eight tenths train, one validation, one test), so the
    splits cannot overlap, whatever is drawn and in whatever order. Where a length has few distinct sources, as the
    shortest ones have, its share is smaller; where all lengths together have fewer than asked for, fewer come back.
    """

    longer_only: ClassVar[bool] = False

    train_length: int = 20
    test_length: int = 40  #: the longest that is tested

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test_length < self.train_length + self.longer_only:
            least = "above" if self.longer_only else "at least"
            raise ProbeError(f"test_length ({self.test_length}) must be {least} train_length ({self.train_length})")

    @abstractmethod
    def source(self, length: int, rng: np.random.Generator) -> tuple[str, ...]:
        """A source of that length, drawn."""

    @abstractmethod
    def target(self, source: tuple[str, ...]) -> tuple[str, ...]:
        """What is to be said of a source."""

    def draw(self, length: int, rng: np.random.Generator) -> Example:
        """One example of that length."""
        check_size("length", length)
        source = self.source(length, rng)
        return Example(source, self.target(source), length)

    def splits(self, *, n_train: int, n_validation: int, n_test: int, seed: int = 0) -> Splits:
        trained = range(1, self.train_length + 1)
        tested = range(self.train_length + 1 if self.longer_only else 1, self.test_length + 1)
        splits = Splits(
            train=self._draw("train", n_train, trained, seed),
            validation=self._draw("validation", n_validation, trained, seed),
            test=self._draw("test", n_test, tested, seed),
        )
        if max(n_train, n_validation, n_test) > 0 and splits == Splits([], [], []):
            raise ProbeError(
                f"examples were wanted, but lengths 1…{self.test_length} hold none of the splits asked for"
            )
        return splits

    def _draw(self, split: str, n: int, lengths: range, seed: int) -> list[Example]:
        """Draw until there are n. Once draws run to repeats (a third of those that fall in this split, after the first
        5,000), a length from which nothing new comes is left out, so that a small language ends too."""
        rng = np.random.default_rng([seed, *split.encode()])
        found: dict[tuple[str, ...], int] = {}
        alive, kept, misses, draws = list(lengths), Counter[int](), Counter[int](), 0
        while len(found) < n and alive:
            length = alive[int(rng.integers(len(alive)))]
            source = self.source(length, rng)
            draws += 1
            if split_of(source) == split and source not in found:
                found[source] = length
                kept[length] += 1
                misses[length] = 0
            elif draws > 5000 + 1.5 * len(found) / SHARES[split]:
                misses[length] += 1
                # One source that is left among k is met in k / share draws: five times as many leave few behind.
                if misses[length] * SHARES[split] > min(50 + 5 * kept[length], 10_000):
                    alive.remove(length)
        return [Example(source, self.target(source), length) for source, length in found.items()]


@dataclass(frozen=True)
class PromptedTask(GeneratedTask):
    """A drawn task whose question stands among constant words, and its answer too; ``prompt`` false leaves them out.

    ``asked`` are the words around the question, which is cut at ``cuts`` where there are more than two texts of them;
    ``told`` are those around the answer.
    """

    told: ClassVar[tuple[str, str]] = ("The answer is", ".")

    prompt: bool = True

    @property
    @abstractmethod
    def asked(self) -> tuple[str, ...]:
        """The texts around the question."""

    @property
    def cuts(self) -> tuple[int, ...]:
        """Where between its words the question is cut; from the end where below 0."""
        return ()

    @property
    @abstractmethod
    def words(self) -> Iterable[str]:
        """The vocabulary of bare questions and answers."""

    @property
    def more_words(self) -> Iterable[str]:
        """What else targets say."""
        return ()

    @abstractmethod
    def question(self, length: int, rng: np.random.Generator) -> tuple[str, ...]:
        """A bare question of that length, drawn."""

    @abstractmethod
    def answer(self, question: tuple[str, ...]) -> tuple[str, ...]:
        """The bare answer."""

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """``words``, those around question and answer, and ``more_words``."""
        constant = " ".join((*self.asked, *self.told)).split() if self.prompt else ()
        return Vocabulary(dict.fromkeys((*self.words, *constant, *self.more_words)))

    def source(self, length: int, rng: np.random.Generator) -> tuple[str, ...]:
        return self.ask(self.question(length, rng))

    def target(self, source: tuple[str, ...]) -> tuple[str, ...]:
        return self.tell(self.answer(self.read(source)))

    @cached_property
    def _asked(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(text.split()) for text in self.asked)

    @cached_property
    def _told(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(text.split()) for text in self.told)

    def ask(self, question: tuple[str, ...]) -> tuple[str, ...]:
        """The source of a bare question."""
        if not self.prompt:
            return question
        source, *texts = self._asked
        for (start, stop), text in zip(pairwise((0, *self.cuts, len(question))), texts, strict=True):
            source += question[start:stop] + text
        return source

    def read(self, source: tuple[str, ...]) -> tuple[str, ...]:
        """The bare question of a source."""
        if not self.prompt:
            return source
        texts = self._asked
        n = len(source) - sum(map(len, texts))
        question: tuple[str, ...] = ()
        start = len(texts[0])
        for (low, high), text in zip(pairwise((0, *(c % max(n, 1) for c in self.cuts), n)), texts[1:], strict=True):
            question += source[start : start + high - low]
            start += high - low + len(text)
        if n < 1 or self.ask(question) != source:
            raise ProbeError(f"a question {' … '.join(self.asked)!r} was wanted, got {' '.join(source)!r}")
        return question

    def tell(self, answer: tuple[str, ...]) -> tuple[str, ...]:
        """The target of a bare answer."""
        before, after = self._told
        return before + answer + after if self.prompt else answer


def split_of(source: Sequence[str]) -> str:
    """The split to which a drawn source belongs, whoever draws it."""
    tenth = int.from_bytes(hashlib.blake2b("\0".join(source).encode(), digest_size=8).digest()) % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def make_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of that name; an unknown name or option is refused."""
    from probe.tasks import TASKS

    check_name("task", name, TASKS)
    return TASKS[name](**check_options(TASKS[name], options or {}))
