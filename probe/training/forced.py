"""What a model makes of completions, given the right tokens before each."""

from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn.functional import cross_entropy

from probe.training.data import EncodedExamples


@torch.no_grad()
def forced_scores(
    logits_of: Callable[[Tensor], Tensor], examples: EncodedExamples, *, batch_size: int = 256
) -> dict[str, Float64[Tensor, "example"]]:
    """By example: "loss", the summed cross entropy of its scored tokens in nats; "token_accuracy", how many of them are
    the likeliest; "exact_match", whether all are, which is what greedy decoding gets right; "scored", how many they
    are. ``logits_of`` takes ids "batch pos"."""
    parts = []
    for rows in torch.arange(len(examples)).split(batch_size):
        batch = examples.batch(rows)
        logits = logits_of(batch.inputs).float().cpu()
        loss = cross_entropy(logits.transpose(1, 2).double(), batch.targets, reduction="none")
        right = (logits.argmax(-1) == batch.targets) & batch.scored
        parts.append(
            torch.stack(
                [
                    loss.where(batch.scored, 0.0).sum(1),
                    right.sum(1).double(),
                    (right == batch.scored).all(1).double(),
                    batch.scored.sum(1).double(),
                ]
            )
        )
    return dict(zip(("loss", "token_accuracy", "exact_match", "scored"), torch.cat(parts, dim=1), strict=True))
