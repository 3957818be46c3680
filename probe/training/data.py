"""Examples as tensors, and the order in which training sees them: a pure function of the seed and the step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from probe.errors import ProbeError
from probe.limits import current
from probe.sequences import first_of_each
from probe.tasks.base import Example, Vocabulary

# Batches are cut from pools of this many, sorted by length, so that little is padded: 0.4 to 2.2 % of the slots for
# the tasks here, at 64 a batch, where pools of 16 leave 2 to 12 %.
BATCHES_IN_POOL = 128


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences. ``targets[b, p]`` is the token after ``inputs[b, p]``; ``scored`` is True where that
    token belongs to the completion, so that only the completion is learned."""

    inputs: Int[Tensor, "batch pos"]
    targets: Int[Tensor, "batch pos"]
    scored: Bool[Tensor, "batch pos"]


@dataclass(frozen=True)
class EncodedExamples:
    """Whole sequences ``<bos> source <sep> target <eos>`` as ids, right-padded with 0."""

    tokens: Int[Tensor, "example pos"]  #: ids
    prompt_lengths: Int[Tensor, "example"]  #: tokens up to and with ``<sep>``, which are not scored
    lengths: Int[Tensor, "example"]  #: tokens without the padding

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def check(data: object) -> None:
        """Refuse what are no encoded examples.

        Raises:
            ProbeError: for anything else; ``probe.encode`` makes them of a task's examples.
        """
        if not isinstance(data, EncodedExamples):
            raise ProbeError(f"data must be EncodedExamples, as probe.encode makes them, got {type(data).__name__}")

    def distinct(self) -> "EncodedExamples":
        """Each distinct example once, as measurements count them (see ``probe.sequences``)."""
        kept = first_of_each(self.tokens, self.lengths, self.prompt_lengths)
        return EncodedExamples(self.tokens[kept], self.prompt_lengths[kept], self.lengths[kept])

    def batch(self, rows: Int[Tensor, "batch"]) -> Batch:
        """The batch of these rows, cut to its longest sequence."""
        lengths = self.lengths[rows]
        tokens = self.tokens[rows, : int(lengths.max())]
        position = torch.arange(tokens.shape[1] - 1)
        scored = (position >= self.prompt_lengths[rows, None] - 1) & (position < lengths[:, None] - 1)
        return Batch(tokens[:, :-1], tokens[:, 1:], scored)

    def to_length(self, length: int) -> Int[Tensor, "kept length"]:
        """The first ``length`` tokens of every sequence that has as many: nothing is padded."""
        return self.tokens[self.lengths >= length, :length]


def encode(examples: Sequence[Example], vocabulary: Vocabulary) -> EncodedExamples:
    """Examples as ids.

    Raises:
        ProbeError: where there is none.
    """
    if not examples:
        raise ProbeError("at least one example was wanted, got none")
    prompts = [vocabulary.prompt(e) for e in examples]
    sequences = [prompt + vocabulary.completion(e) for prompt, e in zip(prompts, examples, strict=True)]
    lengths = np.array([len(s) for s in sequences])
    tokens = np.zeros((len(sequences), lengths.max()), dtype=np.int64)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = np.concatenate(sequences)
    prompt_lengths = torch.tensor([len(p) for p in prompts])
    return EncodedExamples(torch.from_numpy(tokens), prompt_lengths, torch.from_numpy(lengths))


def at_once(n: int, length: int, d_vocab: int) -> int:
    """How many of n sequences of a length a model is given at once: at least one, and as many as the limit
    ``logits_at_once`` allows."""
    return max(1, min(n, current().logits_at_once // (length * d_vocab)))


class BatchOrder:
    """Which examples make up the batch of a step.

    Each epoch is a new permutation; it is cut into pools of ``BATCHES_IN_POOL`` batches, each pool sorted by length
    and its batches shuffled. Nothing is carried from step to step, so a resumed run sees what an unbroken one sees.
    """

    def __init__(self, lengths: Int[Tensor, "example"], batch_size: int, seed: int):
        if batch_size < 1:
            raise ProbeError(f"batch_size must be at least 1, got {batch_size}")
        self.lengths, self.seed = lengths.numpy(), seed
        self.batch_size = min(batch_size, len(lengths))
        self.batches_per_epoch = len(lengths) // self.batch_size
        self._epoch, self._order = -1, np.empty(0)

    def rows(self, step: int) -> Int[Tensor, "batch"]:
        """The rows of the batch of step 0, 1, 2, …"""
        epoch, index = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        return torch.from_numpy(self._order[index])

    def _shuffle(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))[: self.batches_per_epoch * self.batch_size]
        pool = self.batch_size * BATCHES_IN_POOL
        pools = [order[i : i + pool] for i in range(0, len(order), pool)]
        by_length = np.concatenate([p[np.argsort(self.lengths[p], kind="stable")] for p in pools])
        batches = by_length.reshape(-1, self.batch_size)
        return batches[rng.permutation(len(batches))]


@dataclass(frozen=True)
class MicroBatch:
    """What a process works on at a time: ``targets`` are the tokens to be said at the places ``scored`` of the
    flattened inputs. Places, not a mask: to select by a mask, a GPU has to be waited for."""

    inputs: Int[Tensor, "batch pos"]
    scored: Int[Tensor, "scored"]
    targets: Int[Tensor, "scored"]


@dataclass(frozen=True)
class Share:
    """One process's part of the batch of a step, and what the whole batch counts, over all processes."""

    micro_batches: list[MicroBatch]
    n_scored: int
    n_tokens: int  # padding left out


class Feed:
    """The batches of a run, as one of its processes gets them on its device."""

    def __init__(
        self,
        data: EncodedExamples,
        order: BatchOrder,
        device: torch.device,
        accumulation: int = 1,
        process: int = 0,
        n_processes: int = 1,
    ):
        if order.batch_size < n_processes:
            raise ProbeError(f"batches of {order.batch_size} sequences cannot be shared by {n_processes} processes")
        self.data, self.order, self.device = data, order, device
        self.accumulation = accumulation
        self._share = slice(process, None, n_processes)

    def share(self, step: int) -> Share:
        """The share of step 0, 1, 2, … On a GPU nothing here waits for what it is doing."""
        rows = self.order.rows(step)
        lengths = self.data.lengths[rows]
        return Share(
            [self._micro_batch(part) for part in rows[self._share].chunk(self.accumulation)],
            n_scored=int((lengths - self.data.prompt_lengths[rows]).sum()),
            n_tokens=int(lengths.sum()) - len(rows),
        )

    def _micro_batch(self, rows: Int[Tensor, "batch"]) -> MicroBatch:
        batch = self.data.batch(rows)
        scored = batch.scored.flatten().nonzero()[:, 0]
        return MicroBatch(*(self._sent(x) for x in (batch.inputs, scored, batch.targets.flatten()[scored])))

    def _sent(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":  # a copy from pinned memory takes its turn among the kernels
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)
