"""What a probe is asked to read at each token. Positions are 0-based, in tokens."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from probe.errors import ProbeError, unknown_name

Tokens = Int[Tensor, "batch pos"]
Lengths = Int[Tensor, "batch"]
Values = Float64[Tensor, "batch pos target"]


@dataclass(frozen=True)
class TargetContext:
    """What a target may need to know beside the tokens.

    ``separator`` is the token that "relative_to_separator" counts from, ``counted`` the one that "count" counts, and
    ``periods`` those of "fourier", in tokens: powers of two, by default up to the first that is no shorter than the
    longest sequence (``for_length``).
    """

    separator: int | None = None
    counted: int | None = None
    periods: tuple[int, ...] = ()

    def for_length(self, length: int) -> "TargetContext":
        """The same with the periods 2, 4, 8, … for sequences of that length, unless some are set."""
        powers = range(1, max(2, math.ceil(math.log2(max(2, length))) + 1))
        return TargetContext(self.separator, self.counted, self.periods or tuple(2**k for k in powers))


@dataclass(frozen=True)
class Target:
    """A function (tokens, lengths, context) -> "batch pos target", NaN where undefined, and its columns' names."""

    values: Callable[[Tokens, Lengths, TargetContext], Values]  #: one number, or several, a token
    columns: Callable[[TargetContext], Sequence[str]] = lambda context: ("",)  #: their names; "" where there is one


def positions(tokens: Tokens) -> Float64[Tensor, "batch pos 1"]:
    """0, 1, 2, … in every sequence."""
    return torch.arange(tokens.shape[1], dtype=torch.float64).expand(len(tokens), -1)[..., None]


def log_position(tokens: Tokens, lengths: Lengths, context: TargetContext) -> Values:
    """ln(1 + p), in [0, ∞)."""
    return positions(tokens).log1p()


def inverse_position(tokens: Tokens, lengths: Lengths, context: TargetContext) -> Values:
    """1/(p + 1), in (0, 1]: what a uniform head makes of ``<bos>`` (Kazemnejad et al. 2023, theorem 1)."""
    return 1 / (positions(tokens) + 1)


def fourier(tokens: Tokens, lengths: Lengths, context: TargetContext) -> Values:
    """sin 2πp/T and cos 2πp/T for each period T; the sine of period 2 is left out, which is 0 everywhere."""
    waves = []
    for period in context.periods:
        # The phase is reduced in integers: the sine of a large number has lost its last digits.
        phase = 2 * math.pi * (positions(tokens) % period) / period
        waves += [phase.cos()] if period == 2 else [phase.sin(), phase.cos()]
    return torch.cat(waves, dim=-1)


def fourier_names(context: TargetContext) -> list[str]:
    return [f"{wave}_{period}" for period in context.periods for wave in ("sin", "cos") if (wave, period) != ("sin", 2)]


def relative_to_separator(tokens: Tokens, lengths: Lengths, context: TargetContext) -> Values:
    """The signed distance p - s in tokens to the first separator, negative before it; NaN where there is none."""
    if context.separator is None:
        raise ProbeError("target 'relative_to_separator' wants TargetContext(separator=<a token id>), got None")
    p = positions(tokens)
    there = (tokens == context.separator)[..., None] & (p < lengths[:, None, None])
    first = torch.where(there, p, torch.inf).amin(1, keepdim=True)
    return torch.where(first.isfinite(), p - first, torch.nan)


def relative_to_end(tokens: Tokens, lengths: Lengths, context: TargetContext) -> Values:
    """p - (length - 1) in tokens, 0 at the last. Where lengths differ, a causal model cannot know it but guess."""
    return positions(tokens) - (lengths[:, None, None] - 1)


def count(tokens: Tokens, lengths: Lengths, context: TargetContext) -> Values:
    """How often the counted token has occurred up to and with this place."""
    if context.counted is None:
        raise ProbeError("target 'count' wants TargetContext(counted=<a token id>), got None")
    return (tokens == context.counted).cumsum(1, dtype=torch.float64)[..., None]


def position_classes(tokens: Tokens, lengths: Lengths) -> Int[Tensor, "batch pos"]:
    """The position as a class, -1 at padding."""
    p = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    return torch.where(p < lengths[:, None], p, -1)


def target_names(names: Sequence[str], context: TargetContext) -> list[str]:
    """The names of all columns of these targets, a target of several columns as "fourier.cos_4".

    Raises:
        ProbeError: for an unknown target, none, or one that is named twice.
    """
    for name in names:
        if name not in TARGETS:
            raise unknown_name("target", name, TARGETS)
    if not names or len(set(names)) != len(names):
        raise ProbeError(f"targets must name at least one, each once, got {list(names)}")
    return [f"{name}.{column}" if column else name for name in names for column in TARGETS[name].columns(context)]


def target_values(names: Sequence[str], tokens: Tokens, lengths: Lengths, context: TargetContext) -> Values:
    """All columns of these targets side by side, NaN at padding too."""
    values = torch.cat([TARGETS[name].values(tokens, lengths, context) for name in names], dim=-1)
    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    return values.masked_fill(padding[..., None], torch.nan)


#: What a probe may be asked of a token, by name.
TARGETS: dict[str, Target] = {
    "position": Target(lambda tokens, lengths, context: positions(tokens)),
    "log_position": Target(log_position),
    "inverse_position": Target(inverse_position),
    "fourier": Target(fourier, fourier_names),
    "relative_to_separator": Target(relative_to_separator),
    "relative_to_end": Target(relative_to_end),
    "count": Target(count),
}
