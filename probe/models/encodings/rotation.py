"""Encodings that turn queries and keys."""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from probe.config import check_number
from probe.errors import ProbeError
from probe.models.encodings.base import PositionEncoding, Rotation


def rotate(x: Float[Tensor, "batch head pos d_head"], rotation: Rotation) -> Float[Tensor, "batch head pos d_head"]:
    """Turn each pair (x_j, x_{j + d/2}) of queries or keys by its angle (the half-split layout of Llama).

    d is the width of the rotation. Where that is less than d_head, the dimensions after the first d stay as they are
    (the layout of GPT-NeoX).
    """
    cos, sin = (part.unsqueeze(1) for part in rotation)
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], rotation), x[..., width:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Rotary(PositionEncoding):
    """Queries and keys turned by the angle p · base^(-2j/d) in their j-th plane, d = fraction · d_head.

    Su et al. 2021, section 3.2.2, with fraction = 1. A smaller fraction turns the first d dimensions and leaves the
    others as they are: GPT-NeoX (Black et al. 2022, section 2.1) and Pythia turn a quarter.
    """

    def __init__(self, *, base: float = 10000.0, fraction: float = 1.0, **dimensions: int):
        super().__init__(**dimensions)
        check_number("base", base)
        check_number("fraction", fraction)
        width = round(self.d_head * fraction)
        if fraction > 1:
            raise ProbeError(f"fraction must be a number above 0 and at most 1, got {fraction!r}")
        if width % 2 or not math.isclose(width, self.d_head * fraction):
            raise ProbeError(f"rotary positions want an even d_head · fraction, got {self.d_head} · {fraction:g}")
        self.base, self.fraction, self.width = base, fraction, width

    def rotation(self, positions, like):
        even = torch.arange(0, self.width, 2)
        angle = positions[:, None].double() / self.base ** (even.double() / self.width)
        angle = torch.cat((angle, angle), dim=-1)[None]
        return angle.cos().to(like), angle.sin().to(like)


class XPos(Rotary):
    """Rotary positions that fade with the distance d: plane j of q·k is that of rotary times ζ_j^(d/scale_base).

    ζ_j = (2j/d_head + γ) / (1 + γ), γ = 0.4: turned queries at position n are multiplied by ζ^(n/scale_base), turned
    keys divided by it. Sun et al. 2022, section 2 and algorithm 1. Their code counts n from the middle of the sequence,
    so that neither factor leaves the range of floating point; here it counts from n_ctx // 2, which is the same for
    every length, as a cache of keys wants. Products do not see the difference.
    """

    def __init__(self, *, base: float = 10000.0, scale_base: float = 512, **dimensions: int):
        super().__init__(base=base, **dimensions)
        check_number("scale_base", scale_base)
        self.scale_base = scale_base

    def decay(self, positions, like):
        exponent = (positions - self.n_ctx // 2).double() / self.scale_base
        log_zeta = self._log_zeta()
        # Half of the dtype's range is left for the queries and keys themselves.
        steepest = float(exponent.abs().max() * log_zeta.abs().max())
        if steepest > math.log(torch.finfo(like.dtype).max) / 2:
            raise ProbeError(
                f"xpos factors at positions {int(positions.min())}…{int(positions.max())} leave the range of "
                f"{like.dtype}: a larger scale_base than {self.scale_base:g} or a wider dtype is wanted"
            )
        decay = (exponent[:, None] * log_zeta).exp()
        return torch.cat((decay, decay), dim=-1).to(like)

    def _log_zeta(self) -> Float64[Tensor, "plane"]:
        even = torch.arange(0, self.d_head, 2).double()
        return torch.log((even / self.d_head + 0.4) / 1.4)
