"""Encodings that turn queries and keys."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from probe.config import check_number, check_size
from probe.errors import ProbeError, unknown_name
from probe.models.encodings.base import PositionEncoding, Rotation


def rotate(x: Float[Tensor, "batch head pos d_head"], rotation: Rotation) -> Float[Tensor, "batch head pos d_head"]:
    """Turn each pair (x_j, x_{j + d/2}) of queries or keys by its angle (the half-split layout of Llama).

    d is the width of the rotation. Where that is less than d_head, the dimensions after the first d stay as they are
    (the layout of GPT-NeoX).
    """
    half = rotation[0].shape[-1] // 2
    # A plane's angle stands in both halves. By halves is half the work of x cos + (-second, first) sin.
    cos, sin = (part[..., :half].unsqueeze(1) for part in rotation)
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


MOST_FACTOR = 1e9  # its powers stay within floating point


class Rotary(PositionEncoding):
    """Queries and keys turned by the angle p · θ_j, θ_j = base^(-2j/d), in their j-th plane, d = fraction · d_head.

    Su et al. 2021, section 3.2.2, with fraction = 1. A smaller fraction turns the first d dimensions and leaves the
    others as they are: GPT-NeoX (Black et al. 2022, section 2.1) and Pythia turn a quarter.

    With a ``proportion`` p below 1 the ⌊p d/2⌋ fastest planes turn and the others stand still, θ_j = 0, where d is the
    whole width: p-RoPE. It leaves the slowest planes, which carry content, free of positions. Barbero et al. 2024,
    section 6; Gemma 4's layers of full attention. (A ``fraction`` turns fewer planes too, but spreads all frequencies
    over them.)

    ``scaling``, one of ``SCALINGS``, stretches a context of ``trained_length`` tokens (by default n_ctx; only "yarn",
    "longrope" and "llama3" read it) by ``factor``: it changes the θ_j, and "yarn" and "longrope" also lengthen what is
    turned, by an attention factor.

    Args:
        base: above 0.
        fraction: the share of a head's dimensions that are turned, in (0, 1].
        proportion: the share of the planes that turn, in (0, 1].
        scaling, factor, trained_length: see above; the factor is at least 1.
        beta_fast, beta_slow: of "yarn", see there; by default 32 and 1.
        attention_factor: of "yarn" and "longrope": what is turned is multiplied by it. By default the papers' formulas.
        plane_factors: of "longrope": what each plane is slowed by, one number above 0 for each.
    """

    def __init__(
        self,
        *,
        base: float = 10000.0,
        fraction: float = 1.0,
        scaling: str = "none",
        factor: float = 1.0,
        trained_length: int | None = None,
        proportion: float = 1.0,
        beta_fast: float | None = None,
        beta_slow: float | None = None,
        attention_factor: float | None = None,
        plane_factors: Sequence[float] | None = None,
        **dimensions: int,
    ):
        super().__init__(**dimensions)
        check_number("base", base)
        check_number("fraction", fraction)
        width = round(self.d_head * fraction)
        if fraction > 1:
            raise ProbeError(f"fraction must be a number above 0 and at most 1, got {fraction!r}")
        if width % 2 or not math.isclose(width, self.d_head * fraction):
            raise ProbeError(f"rotary positions want an even d_head · fraction, got {self.d_head} · {fraction:g}")
        if not isinstance(scaling, str) or scaling not in SCALINGS:
            raise unknown_name("scaling of rotary positions", scaling, SCALINGS)
        check_number("factor", factor, 1, MOST_FACTOR, closed=True)
        if scaling == "none" and factor != 1:
            raise ProbeError(f"a factor wants a scaling other than 'none', got factor {factor:g} without one")
        if trained_length is not None:
            check_size("trained_length", trained_length)
        length = self.n_ctx if trained_length is None else trained_length
        # Plain attributes, not buffers: they follow from the config and do not belong in checkpoints.
        own = {
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "attention_factor": attention_factor,
            "plane_factors": plane_factors,
        }
        given = {name: value for name, value in own.items() if value is not None}
        for name in given:
            if name not in OPTIONS.get(scaling, ()):
                readers = [s for s, names in OPTIONS.items() if name in names]
                raise ProbeError(f"{name} is an option of {' and '.join(readers)}, got scaling {scaling!r}")
        self.frequencies, self.attention_factor = SCALINGS[scaling](base, width, factor, length, **given)
        check_number("proportion", proportion)
        if proportion > 1:
            raise ProbeError(f"proportion must be a number above 0 and at most 1, got {proportion!r}")
        self.frequencies[int(proportion * width // 2) :] = 0.0

    def rotation(self, positions: Int[Tensor, "pos"], like: Tensor) -> Rotation:
        angle = positions[:, None].double() * self.frequencies
        angle = torch.cat((angle, angle), dim=-1)[None]
        return (angle.cos() * self.attention_factor).to(like), (angle.sin() * self.attention_factor).to(like)


class XPos(Rotary):
    """Rotary positions that fade with the distance d: plane j of q·k is that of rotary times ζ_j^(d/scale_base).

    ζ_j = (2j/d_head + γ) / (1 + γ), γ = 0.4: turned queries at position n are multiplied by ζ^(n/scale_base), turned
    keys divided by it. Sun et al. 2022, section 2 and algorithm 1. Their code counts n from the middle of the sequence,
    so that neither factor leaves the range of floating point; here it counts from n_ctx // 2, which is the same for
    every length, as a cache of keys wants. Products do not see the difference.
    """

    def __init__(self, *, base: float = 10000.0, scale_base: float = 512, **dimensions: Any):
        super().__init__(base=base, **dimensions)
        check_number("scale_base", scale_base)
        self.scale_base = scale_base

    def decay(self, positions: Int[Tensor, "pos"], like: Tensor) -> Float[Tensor, "pos d_head"]:
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


# What a context extension makes of the rotation: its frequencies θ_j in radians per token, and what the turned part of
# queries and keys is multiplied with (scores are multiplied with its square).
Scaled = tuple[Float64[Tensor, "plane"], float]


def plain(base: float, width: int, factor: float, trained_length: int) -> Scaled:
    """θ_j = base^(-2j/d)."""
    even = torch.arange(0, width, 2, dtype=torch.float64, device="cpu")
    return 1 / base ** (even / width), 1.0


def linear(base: float, width: int, factor: float, trained_length: int) -> Scaled:
    """Position interpolation: θ_j / factor. Chen et al. 2023, section 2.3."""
    frequencies, _ = plain(base, width, factor, trained_length)
    return frequencies / factor, 1.0


def ntk(base: float, width: int, factor: float, trained_length: int) -> Scaled:
    """NTK-aware: base · factor^(d/(d-2)) in place of the base, so that the last plane alone is slowed by the whole
    factor. bloc97 2023; Peng et al. 2023, section 3.1."""
    # The single plane of a width of 2 turns by 1 whatever the base is.
    exponent = width / (width - 2) if width > 2 else 0.0
    return plain(base * factor**exponent, width, factor, trained_length)


# Planes that turn more often than the first in the trained length stay as they are; those that turn less often than the
# second are interpolated (Peng et al. 2023, section 3.2, β and α).
BETA_FAST, BETA_SLOW = 32, 1


def yarn(
    base: float,
    width: int,
    factor: float,
    trained_length: int,
    *,
    beta_fast: float = BETA_FAST,
    beta_slow: float = BETA_SLOW,
    attention_factor: float | None = None,
) -> Scaled:
    """NTK-by-parts, θ_j (1 - r_j) + θ_j / factor · r_j, and the attention factor, by default 0.1 ln(factor) + 1.

    r_j rises from 0 at the plane that turns ``beta_fast`` times in the trained length to 1 at that which turns
    ``beta_slow`` times, both rounded outwards to whole planes. Peng et al. 2023, sections 3.2 and 3.4; the ramp over
    planes is that of its released code and of Hugging Face.
    """
    if base <= 1:
        raise ProbeError(f"yarn wants a base above 1, got {base:g}")
    for name, value in (("beta_fast", beta_fast), ("beta_slow", beta_slow), ("attention_factor", attention_factor)):
        if value is not None:
            check_number(name, value)
    if beta_fast < beta_slow:
        raise ProbeError(f"beta_fast must be at least beta_slow, got {beta_fast:g} and {beta_slow:g}")

    def plane(turns: float) -> float:
        return width * math.log(trained_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(plane(beta_fast)), 0), min(math.ceil(plane(beta_slow)), width - 1)
    width_of_ramp = high - low if high != low else 0.001
    frequencies, _ = plain(base, width, factor, trained_length)
    ramp = ((torch.arange(len(frequencies), device="cpu").double() - low) / width_of_ramp).clamp(0, 1)
    return torch.lerp(frequencies, frequencies / factor, ramp), (
        0.1 * math.log(factor) + 1 if attention_factor is None else attention_factor
    )


def longrope(
    base: float,
    width: int,
    factor: float,
    trained_length: int,
    *,
    plane_factors: Sequence[float] = (),
    attention_factor: float | None = None,
) -> Scaled:
    """θ_j / λ_j with a factor λ_j for each plane, and the attention factor (1 + ln(factor) / ln(trained length))^½.

    LongRoPE, Ding et al. 2024, section 3, whose search finds the λ_j; Phi-3's config has them as ``long_factor``.
    """
    frequencies, _ = plain(base, width, factor, trained_length)
    if not plane_factors:  # as in ``linear``
        plane_factors = [factor] * len(frequencies)
    if len(plane_factors) != len(frequencies):
        raise ProbeError(f"plane_factors must be one for each of {len(frequencies)} planes, got {len(plane_factors)}")
    for value in plane_factors:
        check_number("plane_factors", value)
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(trained_length)) if trained_length > 1 else 1.0
    check_number("attention_factor", attention_factor)
    return frequencies / torch.tensor([*plane_factors], dtype=torch.float64), attention_factor


# Planes with a wavelength above the trained length over the first are interpolated, those with one below the trained
# length over the second stay as they are.
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR = 1, 4


def llama3(base: float, width: int, factor: float, trained_length: int) -> Scaled:
    """θ_j s_j + θ_j / factor · (1 - s_j), where s_j rises linearly in θ_j from 0 to 1 as the trained length grows from
    ``LOW_FREQ_FACTOR`` to ``HIGH_FREQ_FACTOR`` wavelengths. Llama 3.1's released code (Grattafiori et al. 2024)."""
    frequencies, _ = plain(base, width, factor, trained_length)
    turns = trained_length * frequencies / (2 * math.pi)
    smooth = ((turns - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR)).clamp(0, 1)
    return torch.lerp(frequencies / factor, frequencies, smooth), 1.0


# Which scaling reads which further options.
OPTIONS: dict[str, tuple[str, ...]] = {
    "yarn": ("beta_fast", "beta_slow", "attention_factor"),
    "longrope": ("plane_factors", "attention_factor"),
}

# From base, width d of the rotation, factor, trained length, and the options of its own.
SCALINGS: dict[str, Callable[..., Scaled]] = {
    "none": plain,
    "linear": linear,
    "ntk": ntk,
    "yarn": yarn,
    "longrope": longrope,
    "llama3": llama3,
}
