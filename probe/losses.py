"""What the logits of a model say: losses by token and by sequence, and the likeliest token."""

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from probe.errors import ProbeError


def token_losses(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float64[Tensor, "batch pos-1"]:
    """The cross entropy, in nats, of every token but the first given those before it.

    Raises:
        ProbeError: for logits of which that cannot be said, NaN among them.
    """
    # In float64 some positions at a time: all of them would double what a long text's logits hold.
    parts = zip(logits[:, :-1].split(1024, dim=1), tokens[:, 1:].split(1024, dim=1), strict=True)
    found = [
        cross_entropy(part.transpose(1, 2).double(), targets.to(part.device), reduction="none")
        for part, targets in parts
    ]
    losses = torch.cat(found, dim=1)
    if losses.isnan().any():
        raise _not_finite()
    return losses


def likeliest(logits: Float[Tensor, "*batch d_vocab"]) -> Int[Tensor, "*batch"]:
    """The token of the highest logit, the first of equal ones.

    Raises:
        ProbeError: where that is NaN or infinite: among NaN some token would be the likeliest, too.
    """
    token = logits.argmax(-1)
    if not logits.gather(-1, token[..., None]).isfinite().all():
        raise _not_finite()
    return token


def _not_finite() -> ProbeError:
    return ProbeError("a model's logits must be finite, got NaN or infinity (half precision may have overflowed)")


def sequence_losses(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], scored: Bool[Tensor, "batch pos"]
) -> Float64[Tensor, "batch"]:
    """The cross entropy of each sequence's scored tokens given those before them, summed, in nats."""
    return token_losses(logits, tokens).where(scored[:, 1:], 0.0).sum(1)
