"""What models are measured on: sequences, the labelled examples of a task, texts."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from probe.config import check_size
from probe.errors import ProbeError
from probe.models.checkpoint import digest_of
from probe.models.decoder import Decoder
from probe.tasks import Splits, Task, make_task
from probe.tasks.passkey import Passkey
from probe.training import EncodedExamples, encode
from probe.training.evaluation import context_length

Drawn = TypeVar("Drawn", bound="Examples")
Within = TypeVar("Within", bound="Texts")


class _Traced(NamedTuple):
    tokens: Int[Tensor, "sequence pos"]  #: ids, none of them padding
    scored: Bool[Tensor, "sequence pos"] | None  #: True for those that a model learns to predict


class TracedSequences(_Traced):
    """Sequences on which models are looked at, and which of their tokens a model learns to predict (None: all).

    ``tokens, scored = traced`` takes them apart; ``data`` says in words which data they are: a task, texts, or a file.
    """

    data: str  #: what rows and pages say of it

    @property
    def digest(self) -> str:
        """The SHA-256 of the ids and of which of them are scored."""
        scored = {} if self.scored is None else {"scored": self.scored}
        return digest_of({"tokens": self.tokens, **scored})

    def __new__(
        cls,
        tokens: Int[Tensor, "sequence pos"],
        scored: Bool[Tensor, "sequence pos"] | None = None,
        data: str = "token ids",
    ) -> "TracedSequences":
        made = super().__new__(cls, tokens, scored)
        made.data = data
        return made


@dataclass(frozen=True)
class Examples:
    """The labelled examples of a task, split."""

    task: Task  #: with its options
    splits: Splits  #: as examples
    train: EncodedExamples  #: the training split as ids
    held_out: EncodedExamples  #: validation and test, one after the other

    @classmethod
    def draw(
        cls: type[Drawn],
        name: str,
        options: dict[str, Any],
        *,
        n_train: int,
        n_validation: int,
        n_test: int,
        seed: int,
    ) -> Drawn:
        """The examples of a task, the same every time.

        Args:
            name: of ``probe.tasks.TASKS``.
            options: the task's own.
            n_train, n_validation, n_test: how many examples of each split there are at most.
            seed: of whatever the task draws.
        """
        task = make_task(name, options)
        splits = task.splits(n_train=n_train, n_validation=n_validation, n_test=n_test, seed=seed)
        held_out = encode([*splits.validation, *splits.test], task.vocabulary)
        return cls(task, splits, encode(splits.train, task.vocabulary), held_out)

    @property
    def digest(self) -> str:
        """The SHA-256 of all splits."""
        parts = {
            f"{name} {part}": getattr(data, part)
            for name, data in (("train", self.train), ("held out", self.held_out))
            for part in ("tokens", "prompt_lengths", "lengths")
        }
        return digest_of({**parts, "n_validation": torch.tensor(len(self.splits.validation))})

    @property
    def n_ctx(self) -> int:
        """The longest sequence, what evaluation may decode included."""
        return context_length(self.train, (*self.splits.validation, *self.splits.test), self.task)

    def sequences(self, length: int, n: int, seed: int, data: str) -> TracedSequences:
        """Held-out sequences, mixed and cut to one length: real text of the task, without padding.

        Args:
            length: tokens of each.
            n: how many there are at most.
            seed: of the order.
            data: what rows say of it.

        Raises:
            ProbeError: where fewer than four are so long.
        """
        made = self.task.looked_at(length, n, seed)
        held_out = encode(made, self.task.vocabulary) if made else self.held_out
        tokens = held_out.to_length(length)
        if len(tokens) < 4:
            raise ProbeError(
                f"trace_length ({length}) must be short enough for at least 4 held-out sequences, got {len(tokens)}"
            )
        prompts = held_out.prompt_lengths[held_out.lengths >= length]
        scored = torch.arange(length) >= prompts[:, None]
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
        return TracedSequences(tokens[order[:n]], scored[order[:n]], data)

    def held_out_sequences(self, seed: int, most: int = 300) -> tuple[Tensor, Tensor]:
        """Whole held-out sequences, mixed, right-padded, and their lengths."""
        order = torch.randperm(len(self.held_out), generator=torch.Generator().manual_seed(seed))[:most]
        return self.held_out.tokens[order], self.held_out.lengths[order]


@dataclass(frozen=True)
class Texts:
    """Texts in a model's own tokens, with and without a hidden key, up to beyond the length it was trained with."""

    task: Passkey  #: where the texts come from, and how they are tokenised
    extensions: tuple[int, ...] = (2, 4, 8)  #: how many times the trained length is looked at, besides that length
    n_texts: int = 32  #: held-out texts
    n_prompts: int = 10  #: prompts of each length and depth
    seed: int = 0  #: of which texts and keys are drawn
    #: whether the models were trained with the task's length; else it is only the shortest that they are looked at
    trained: bool = True

    def __post_init__(self) -> None:
        for name in ("n_texts", "n_prompts"):
            check_size(name, getattr(self, name))
        for extension in self.extensions:
            check_size("extensions", extension)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides which texts there are, by name; of the task its own settings."""
        return asdict(self) | {"task": self.task.settings}

    @property
    def train_length(self) -> int | None:
        """The length with which the models were trained, in tokens; None where nothing says it."""
        return self.task.train_length if self.trained else None

    @property
    def contexts(self) -> list[int]:
        """The trained length and its extensions, in tokens."""
        return [self.task.train_length * s for s in (1, *self.extensions)]

    def within(self: Within, *models: nn.Module) -> Within:
        """As far as all of these models know positions."""
        last = last_position_of(models)
        kept = [s for s in self.extensions if last is None or s * self.task.train_length <= last + 1]
        return replace(self, extensions=tuple(kept))

    def texts(self, split: str, length: int, n: int) -> EncodedExamples:
        """Up to n pieces of plain text of so many tokens."""
        rng = np.random.default_rng([self.seed, length, *split.encode()])
        return encode(self.task.plain(split, length, n, rng), self.task.vocabulary)

    @functools.cached_property
    def held_out(self) -> Int[Tensor, "text token"]:
        """Test texts as long as the longest context, without the prefix."""
        return self.held_out_of(self.contexts[-1])

    def held_out_of(self, length: int) -> Int[Tensor, "text token"]:
        """Test texts of so many tokens, without the prefix, which is counted in the length."""
        return self.texts("test", length, self.n_texts).tokens[:, len(self.task.plain_prefix) :]


def last_position_of(models: Iterable[nn.Module]) -> int | None:
    """The last position that all of these models know; None where none of them has a last one."""
    lasts = [model.encoding.last_position for model in models if isinstance(model, Decoder)]
    return min((last for last in lasts if last is not None), default=None)


def check_contexts(texts: Texts, contexts: Sequence[int]) -> None:
    """Refuse contexts that hold less than the prefix of a text and four tokens."""
    least = len(texts.task.plain_prefix) + 4
    if max(contexts) < least:
        raise ProbeError(f"contexts must be of at least {least} tokens, got {max(contexts)}")
