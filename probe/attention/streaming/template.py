"""Templates of long sequences: as a bias by distance, from which their rows follow, instead of as a pattern."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from probe.errors import ProbeError
from probe.models.encodings import t5_bucket


@dataclass(frozen=True)
class StreamTemplate:
    """The attention that distance alone would make: row t is softmax_{i ≤ t} b(t - i).

    b(d) is ``near[:, d]`` at the nearest distances, in nats, and from there on falls by ``slope`` a token (it rises
    where slope < 0): b(d) = tail - slope (d - D) for d >= D = near.shape[1]. Without a tail (None) the template ends
    after D distances and fits no longer sequence. Make one by ``alibi``, ``t5`` or ``by_distance``.
    """

    near: Float64[Tensor, "head near"]
    tail: Float64[Tensor, "head"] | None = None  #: b(D), where the line begins, in nats
    slope: Float64[Tensor, "head"] | None = None

    def __post_init__(self) -> None:
        for name in ("near", "tail", "slope"):
            value = getattr(self, name)
            if value is not None and not value.isfinite().all():
                raise ProbeError(f"a template's {name} must be finite, got NaN or infinity")

    @classmethod
    def alibi(cls, slopes: Float[Tensor, "head"]) -> "StreamTemplate":
        """softmax(-m_h (t - i)), m_h in nats per token (``alibi_slopes(n_heads)``, or fitted ones; 0 is uniform)."""
        slope = _float64(slopes)
        return cls(slope.new_zeros(len(slope), 0), torch.zeros_like(slope), slope)

    @classmethod
    def t5(cls, table: Float[Tensor, "n_buckets head"], max_distance: int = 128) -> "StreamTemplate":
        """softmax of a T5 bias in nats, as ``probe.models.encodings.T5.weight`` holds it."""
        table = _float64(table)
        bucket = t5_bucket(torch.arange(max_distance + 1), len(table), max_distance)
        reach = int((bucket < len(table) - 1).sum())  # all further distances share the last bucket
        return cls(table[bucket[:reach]].T.contiguous(), table[-1].clone(), torch.zeros_like(table[-1]))

    @classmethod
    def by_distance(cls, bias: Float[Tensor, "head distance"]) -> "StreamTemplate":
        """softmax of any bias b(d) in nats, for sequences of at most as many tokens as it has distances."""
        return cls(_float64(bias))

    @property
    def n_heads(self) -> int:
        """The heads that it is a template of."""
        return len(self.near)

    def bias(self, n: int) -> Float64[Tensor, "head distance"]:
        """b(0), …, b(n - 1).

        Raises:
            ProbeError: where the template has no tail and ends before.
        """
        reach = self.near.shape[1]
        if self.tail is None or self.slope is None:
            if n > reach:
                raise ProbeError(f"this template has a bias for {reach} distances, got a sequence of {n} tokens")
            return self.near[:, :n]
        further = torch.arange(max(0, n - reach), dtype=torch.float64)
        return torch.cat((self.near[:, :n], self.tail[:, None] - self.slope[:, None] * further), dim=-1)


def log_normaliser(bias: Float64[Tensor, "head distance"]) -> Float64[Tensor, "head query"]:
    """ln Z_t = ln Σ_{d ≤ t} exp b(d) of each row."""
    return bias.logcumsumexp(-1)


def negative_entropy(bias: Float64[Tensor, "head distance"]) -> Float64[Tensor, "head query"]:
    """E_T[ln T] of each row, in [-ln(t + 1), 0]: E_T[b] - ln Z_t.

    The mean is taken of highest - b >= 0 in logarithms, where nothing over- or underflows.
    """
    log_z = log_normaliser(bias)
    highest = bias.amax(-1, keepdim=True)
    below = ((highest - bias).log() + bias).logcumsumexp(-1)
    return highest - (below - log_z).exp() - log_z


def _float64(x: Tensor) -> Tensor:
    return x.detach().double().cpu()
