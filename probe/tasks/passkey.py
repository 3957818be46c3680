"""Passkey retrieval: a key of five digits, hidden at some depth in a long text, is to be said at its end.

Mohtashami & Jaggi 2023, section 4.2; Wang et al. 2024, section 4.3. Here a prompt holds the key exactly once.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from probe.config import check_number, check_size
from probe.errors import ProbeError
from probe.tasks.base import Example, Splits, Task, Vocabulary
from probe.tasks.corpus import BYTE_TOKENS, PYTHON, Corpus, byte_tokens, read_corpus

# The filler of the papers, again and again.
SENTENCES = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NAMES = (
    *("amber", "birch", "cedar", "daisy", "ebony", "fern", "grape", "hazel", "iris", "jade", "kelp", "lilac"),
    *("maple", "nutmeg", "olive", "pearl", "quartz", "rose", "sage", "tulip", "umber", "violet", "willow", "yarrow"),
)
DEPTHS = tuple(round(i / 9, 3) for i in range(10))
FRAME = 3  # <bos> before the prompt, <sep> behind it, <eos> behind the key
PLAIN_FRAME = 2  # <bos> and <sep> before plain text, which goes on behind its end


@dataclass(frozen=True)
class Prompt:
    """A text with keys in it and a question at its end."""

    text: bytes
    key: str  # what is to be said
    depth: float  # the share of the filler that stands before the sentence with that key, as it came out
    start: int  # the byte at which the key stands

    def example(self, length: int) -> Example:
        """``<bos> text <sep> key <eos>``, of so many tokens."""
        return Example(byte_tokens(self.text), byte_tokens(self.key.encode()), length)


@dataclass(frozen=True)
class Passkey(Task):
    """Say the key that a text of bytes holds somewhere; a length is that of the whole sequence, in tokens.

    Training and validation are of lengths up to ``train_length``, the test is longer, to ``test_length``; depths are
    uniform. Validation and test prompts are cut from files that training does not see.

    Args:
        text: where the filler comes from: a folder, or "python", the standard library's sources.
        filler: "text", pieces of that text, or "sentences", the papers' five about grass and sky.
        n_keys: keys in a prompt. With more than one each has a name, and the question is for one of them.
        text_share: the share of the training examples that are plain text, ``<bos> <sep> text``, every byte of which is
            learned: the model is a language model, too.
    """

    text: str = PYTHON
    filler: Literal["text", "sentences"] = "text"
    train_length: int = 256
    test_length: int = 512
    n_keys: int = 1
    text_share: float = 0.5

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
    def vocabulary(self) -> Vocabulary:
        """The 256 bytes."""
        return Vocabulary(BYTE_TOKENS)

    @cached_property
    def corpus(self) -> Corpus:
        return read_corpus(self.text)

    @property
    def least_length(self) -> int:
        """The length of the longest prompt without filler, and its key."""
        longest = max(NAMES, key=len) if self.n_keys > 1 else ""
        sentences = self.n_keys * len(_told(longest, "00000"))
        return sentences + len(_asked(longest)) + 5 + FRAME

    def prompt(
        self, length: int, depth: float | None, rng: np.random.Generator, split: str = "test", n_digits: int = 5
    ) -> Prompt:
        """A prompt that makes a sequence of ``length`` tokens, with the key that is asked for at ``depth`` (0, at the
        start, … 1, before the question; drawn where None) and the others, if any, at depths drawn.

        Raises:
            ProbeError: for a length that has no room for the sentences and the question, or a depth outside [0, 1].
        """
        check_size("length of a passkey prompt", length, self.least_length)
        if depth is not None and not 0 <= depth <= 1:
            raise ProbeError(f"depth must lie in 0…1, got {depth}")
        names = rng.permutation(NAMES)[: self.n_keys].tolist() if self.n_keys > 1 else [""]
        while True:
            keys = [str(k) for k in rng.integers(10 ** (n_digits - 1), 10**n_digits, self.n_keys).tolist()]
            told = [_told(name, key) for name, key in zip(names, keys, strict=True)]
            asked = _asked(names[0])
            n_filler = length - FRAME - sum(map(len, told)) - len(asked) - n_digits
            depths = rng.random(self.n_keys)
            if depth is not None:
                depths[0] = depth
            text, start, before = self._compose(told, np.rint(depths * n_filler).astype(int), n_filler, split, rng)
            text += asked
            # A key that the filler, or another key, holds as well would be found in two places.
            if all(text.count(key.encode()) == 1 for key in keys):
                start += told[0].index(keys[0].encode())
                return Prompt(text, keys[0], before / n_filler if n_filler else 0.0, start)

    def _compose(self, told, places, n_filler, split, rng) -> tuple[bytes, int, int]:
        """The filler with the sentences in it; where the first of them starts, and how much filler is before it."""
        if self.filler == "text":
            filler = self.corpus.draw(split, n_filler, rng)
        else:
            filler = (SENTENCES * (n_filler // len(SENTENCES) + 1))[:n_filler]
        pieces, done, start = [], 0, 0
        for i in np.argsort(places, kind="stable").tolist():
            pieces.append(filler[done : places[i]])
            if i == 0:
                start = sum(map(len, pieces))
            pieces.append(told[i])
            done = places[i]
        return b"".join((*pieces, filler[done:])), start, int(places[0])

    def splits(self, *, n_train, n_validation, n_test, seed=0):
        rng = {split: np.random.default_rng([seed, *split.encode()]) for split in ("train", "validation", "test")}
        n_text = round(self.text_share * n_train)
        n_bytes = self.train_length - PLAIN_FRAME
        plain = [_piece(self.corpus.draw("train", n_bytes, rng["train"])) for _ in range(n_text)]
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
            example = self.prompt(length, None, rng, split).example(length)
            found[example.source] = example
        return list(found.values())

    def plain(self, split: str, length: int, n: int, rng: np.random.Generator) -> list[Example]:
        """Up to n pieces of text that do not overlap, ``<bos> <sep> text``, of ``length`` tokens each."""
        return [_piece(text) for text in self.corpus.windows(split, length - PLAIN_FRAME, n, rng)]

    def looked_at(self, length, n, seed):
        """Plain text: of a prompt nothing but the key is learned."""
        return self.plain("test", length, n, np.random.default_rng(seed))

    @property
    def plain_prefix(self) -> tuple[int, ...]:
        """The ids in front of plain text."""
        return tuple(self.vocabulary.prompt(Example((), (), 1)))


def _piece(text: bytes) -> Example:
    return Example((), byte_tokens(text), len(text) + PLAIN_FRAME, ends=False)


def _told(name: str, key: str) -> bytes:
    return f"\nThe pass key{_of(name)} is {key}. Remember it.\n".encode()


def _asked(name: str) -> bytes:
    return f"\nWhat is the pass key{_of(name)}? The pass key{_of(name)} is ".encode()


def _of(name: str) -> str:
    return f" of {name}" if name else ""


TASKS: dict[str, type[Task]] = {"passkey": Passkey}
