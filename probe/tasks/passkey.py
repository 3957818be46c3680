"""Passkey retrieval: a key of five digits, hidden at some depth in a long text, is to be said at its end.

Mohtashami & Jaggi 2023, section 4.2; Wang et al. 2024, section 4.3. Here a prompt holds the key exactly once.
"""

import bisect
import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np

from probe.config import check_number, check_size
from probe.errors import ProbeError
from probe.limits import current
from probe.tasks.base import Example, Splits, Task
from probe.tasks.byte_vocabulary import ByteVocabulary, byte_tokens
from probe.tasks.corpus import PYTHON, Corpus, read_corpus
from probe.tasks.options import Folder
from probe.tasks.tokenizer_files import tokenizer_digest
from probe.tasks.tokenizers import TextVocabulary, read_tokenizer

# The filler of the papers, again and again.
SENTENCES = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NAMES = (
    *("amber", "birch", "cedar", "daisy", "ebony", "fern", "grape", "hazel", "iris", "jade", "kelp", "lilac"),
    *("maple", "nutmeg", "olive", "pearl", "quartz", "rose", "sage", "tulip", "umber", "violet", "willow", "yarrow"),
)
DEPTHS = tuple(round(i / 9, 3) for i in range(10))
# By which the room that a key takes is known: nine first digits, and more.
SAMPLE_KEYS = tuple(str(k) for k in (*range(11_111, 100_000, 11_111), *range(10_007, 100_000, 9_001)))


@dataclass(frozen=True)
class Prompt:
    """A text with keys in it and a question at its end."""

    example: Example  # ``<bos> text <sep> key <eos>``, or what a tokenizer has of these
    text: bytes
    key: str  # what is to be said
    depth: float  # the share of the filler that stands before the sentence with that key, as it came out
    start: int  # the byte at which the key stands


@dataclass(frozen=True)
class Passkey(Task):
    """Say the key that a text holds somewhere; a length is that of the whole sequence, in tokens: bytes, or those of a
    released model's tokenizer.

    Training and validation are of lengths up to ``train_length``, the test is longer, to ``test_length``; depths are
    uniform. Validation and test prompts are cut from files that training does not see.

    A tokenizer's prompt is filler, sentences and question, each tokenised by itself. It ends where the tokens of keys
    begin to differ, behind "is" or behind the space, so that the key's tokens are those which it has in running text.
    Such a model has not learned to stop behind a key, and need not.

    Args:
        text: where the filler comes from: a folder, or "python", the standard library's sources.
        filler: "text", pieces of that text, or "sentences", the papers' five about grass and sky.
        n_keys: keys in a prompt. With more than one each has a name, and the question is for one of them.
        text_share: the share of the training examples that are plain text, ``<bos> <sep> text``, every byte of which is
            learned: the model is a language model, too.
        tokenizer: a folder with a tokenizer, as released models have it; none: bytes.
    """

    text: str = PYTHON
    filler: Literal["text", "sentences"] = "text"
    train_length: int = 256
    test_length: int = 512
    n_keys: int = 1
    text_share: float = 0.5
    tokenizer: Folder = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("text_share of task 'passkey'", self.text_share, 0, 1, closed=True)
        if self.n_keys > len(NAMES):
            raise ProbeError(f"n_keys must be at most {len(NAMES)}, one for every name, got {self.n_keys}")
        if self.train_length < self.least_length:
            raise ProbeError(
                f"train_length must be at least {self.least_length}, the prompt without filler, got {self.train_length}"
            )
        if self.test_length <= self.train_length:
            raise ProbeError(f"test_length ({self.test_length}) must be above train_length ({self.train_length})")

    @cached_property
    def vocabulary(self) -> ByteVocabulary | TextVocabulary:
        return read_tokenizer(self.tokenizer) if self.tokenizer else ByteVocabulary()

    @cached_property
    def corpus(self) -> Corpus:
        corpus = read_corpus(self.text)
        return corpus.in_tokens(self.vocabulary) if self.tokenizer else corpus

    @property
    def settings(self) -> dict[str, Any]:
        """The options by name, with digests of the texts and of the tokenizer in place of where these lie: what two
        tasks must share for the same prompts and the same pieces of text."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        tokenizer = tokenizer_digest(self.tokenizer) if self.tokenizer else ""
        return {**options, "text": self.corpus.digest, "tokenizer": tokenizer}

    @cached_property
    def least_length(self) -> int:
        """The length of the longest prompt without filler, and its key: of bytes, all are equally long; of tokens, the
        longest with any of ``SAMPLE_KEYS``."""
        pairs = [(name, key) for name in (NAMES if self.n_keys > 1 else ("",)) for key in SAMPLE_KEYS]
        told, asked = (max(len(self.vocabulary.tokenize(f(*pair))) for pair in pairs) for f in (_told, _answered))
        return self.n_keys * told + asked + self._frame

    @property
    def plain_prefix(self) -> tuple[int, ...]:
        """The ids in front of plain text."""
        return tuple(self.vocabulary.prompt(Example((), (), 1)))

    @property
    def _frame(self) -> int:
        """The tokens around a prompt and its key."""
        return len(self.plain_prefix) + len(self.vocabulary.completion(Example((), (), 1, ends=not self.tokenizer)))

    def prompt(self, length: int, depth: float | None, rng: np.random.Generator, split: str = "test") -> Prompt:
        """A prompt that makes a sequence of ``length`` tokens, with the key that is asked for at ``depth`` (0, at the
        start, … 1, before the question; drawn where None) and the others, if any, at depths drawn.

        Raises:
            ProbeError: for a length that has no room for the sentences and the question, a depth outside [0, 1], or a
                tokenizer that has no such prompt: one that loses digits, say.
        """
        check_size("length of a passkey prompt", length, self.least_length)
        if depth is not None and not 0 <= depth <= 1:
            raise ProbeError(f"depth must lie in 0…1, got {depth}")
        names = rng.permutation(NAMES)[: self.n_keys].tolist() if self.n_keys > 1 else [""]
        tokenize, asked = self.vocabulary.tokenize, _asked(self.vocabulary, names[0])
        most = current().passkey_draws
        for _ in range(most):
            keys = [str(k) for k in rng.integers(10**4, 10**5, self.n_keys).tolist()]
            told = [tokenize(_told(name, key)) for name, key in zip(names, keys, strict=True)]
            answered = tokenize(_answered(names[0], keys[0]))
            n_filler = length - self._frame - sum(map(len, told)) - len(answered)
            target = answered[len(asked) :]
            # Tokens of few keys are more than those of any sample, or join the question.
            if n_filler < 0 or answered[: len(asked)] != asked or list(self.said(target)) != list(keys[0]):
                continue
            depths = rng.random(self.n_keys)
            if depth is not None:
                depths[0] = depth
            places = np.rint(depths * n_filler).astype(int)
            source = self._compose(told, places, self._filler(n_filler, split, rng)) + asked
            text = self.vocabulary.text(source)
            # A key that the filler, or another key, holds as well would be found in two places.
            if all(text.count(key.encode()) == 1 for key in keys):
                example = Example(source, target, length, ends=not self.tokenizer)
                came_out = int(places[0]) / n_filler if n_filler else 0.0
                return Prompt(example, text, keys[0], came_out, text.index(keys[0].encode()))
        raise ProbeError(f"a prompt of {length} tokens that holds its key once was wanted, got none in {most:,} draws")

    def _filler(self, n: int, split: str, rng: np.random.Generator) -> tuple[str, ...]:
        if self.filler == "text":
            return self._spelled(self.corpus.draw(split, n, rng))
        # The space at its end may be a token, which at the next time is part of a word.
        per_time = len(self.vocabulary.tokenize(SENTENCES)) - 1
        return self.vocabulary.tokenize(SENTENCES * (n // per_time + 1))[:n]

    def _compose(self, told: list[tuple[str, ...]], places: np.ndarray, filler: tuple[str, ...]) -> tuple[str, ...]:
        """The filler with the sentences in it."""
        pieces, done = [], 0
        for i in np.argsort(places, kind="stable").tolist():
            pieces += [filler[done : places[i]], told[i]]
            done = places[i]
        return tuple(token for piece in (*pieces, filler[done:]) for token in piece)

    def _spelled(self, window: Sequence[int]) -> tuple[str, ...]:
        """A piece of the corpus as tokens."""
        return tuple(self.vocabulary.decode(window)) if self.tokenizer else byte_tokens(bytes(window))

    def tokens_of_key(self, prompt: Prompt) -> tuple[int, int]:
        """Where the key stands in the ids of a prompt's example: the first of its tokens, and the one behind its last.
        A token that is a part of the key and more, a space before it, say, counts."""
        source = prompt.example.source
        ends = [len(self.vocabulary.text(source[: i + 1])) for i in range(len(source))]
        first = bisect.bisect_right(ends, prompt.start)
        last = bisect.bisect_left(ends, prompt.start + len(prompt.key))
        begins = min(1, len(self.plain_prefix))  # behind ``<bos>``, if there is one
        return begins + first, begins + last + 1

    def said(self, tokens: Sequence[str]) -> Sequence[str]:
        """What a model says as a key, by characters: all of it in bytes; with a tokenizer, whose model goes on behind
        the key, the digits with which its text begins."""
        if not self.tokenizer:
            return tokens
        return re.findall(rb"^\s*(\d*)", self.vocabulary.text(tokens))[0].decode()

    def splits(self, *, n_train: int, n_validation: int, n_test: int, seed: int = 0) -> Splits:
        rng = {split: np.random.default_rng([seed, *split.encode()]) for split in ("train", "validation", "test")}
        n_text = round(self.text_share * n_train)
        n_plain = self.train_length - len(self.plain_prefix)
        plain = [self._piece(self.corpus.draw("train", n_plain, rng["train"])) for _ in range(n_text)]
        trained, tested = (self.least_length, self.train_length), (self.train_length + 1, self.test_length)
        return Splits(
            train=[*self._prompts("train", n_train - n_text, *trained, rng["train"]), *plain],
            validation=self._prompts("validation", n_validation, *trained, rng["validation"]),
            test=self._prompts("test", n_test, *tested, rng["test"]),
        )

    def _prompts(self, split: str, n: int, shortest: int, longest: int, rng: np.random.Generator) -> list[Example]:
        found: dict[tuple[str, ...], Example] = {}
        while len(found) < n:
            length = int(rng.integers(shortest, longest + 1))
            example = self.prompt(length, None, rng, split).example
            found[example.source] = example
        return list(found.values())

    def plain(self, split: str, length: int, n: int, rng: np.random.Generator) -> list[Example]:
        """Up to n pieces of text that do not overlap, ``<bos> <sep> text``, of ``length`` tokens each."""
        return [self._piece(w) for w in self.corpus.windows(split, length - len(self.plain_prefix), n, rng)]

    def _piece(self, window: Sequence[int]) -> Example:
        # Nothing predicts the first token of all: where nothing stands before the text, that is given.
        tokens, given = self._spelled(window), 0 if self.plain_prefix else 1
        return Example(tokens[:given], tokens[given:], len(tokens) + len(self.plain_prefix), ends=False)

    def looked_at(self, length: int, n: int, seed: int) -> list[Example]:
        """Plain text: of a prompt nothing but the key is learned."""
        return self.plain("test", length, n, np.random.default_rng(seed))


@functools.lru_cache(maxsize=256)
def _asked(vocabulary: ByteVocabulary | TextVocabulary, name: str) -> tuple[str, ...]:
    """The question, as far as it is the same whatever the key."""
    places = zip(*(vocabulary.tokenize(_answered(name, key)) for key in SAMPLE_KEYS), strict=False)
    return tuple(tokens[0] for tokens in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, places))


def _told(name: str, key: str) -> bytes:
    return f"\nThe pass key{_of(name)} is {key}. Remember it.\n".encode()


def _answered(name: str, key: str) -> bytes:
    return f"\nWhat is the pass key{_of(name)}? The pass key{_of(name)} is {key}".encode()


def _of(name: str) -> str:
    return f" of {name}" if name else ""


TASKS: dict[str, type[Task]] = {"passkey": Passkey}
