"""The hidden states that every function of the geometry measures, with their controls, and the intervals they share."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from scipy.stats import rankdata
from torch import Tensor

from probe.errors import ProbeError
from probe.position.probes.moments import precision
from probe.position.probes.scores import Draws
from probe.sequences import valid_rows
from probe.tracing import Trace, distinct


@dataclass(frozen=True)
class States:
    """The hidden states of one site: 0 where ``present`` is False, which is padding."""

    site: str
    control: str
    x: Float64[Tensor, "batch pos d_model"]
    present: Bool[Tensor, "batch pos"]
    tokens: Int[Tensor, "batch pos"]
    rounding: float  # a variance below this is one that rounding made

    def means(self, times: Float64[Tensor, "batch"]) -> Float64[Tensor, "pos d_model"]:
        """The mean over sequences at each position, each sequence taken so many times; NaN where none of them is."""
        count = times @ self.present.double()
        return torch.tensordot(times, self.x, dims=1) / count[:, None]

    @functools.cached_property
    def rows(self) -> tuple[Float64[Tensor, "row d_model"], list[Int[Tensor, "row"]]]:
        """What is present, and of each row its position, its sequence and its token (as a number below theirs)."""
        sequence, position = self.present.nonzero(as_tuple=True)
        tokens = self.tokens[sequence, position].unique(return_inverse=True)[1]
        return self.x[sequence, position], [position, sequence, tokens]


def moved_interval(draws: Draws, scores: Float64[Tensor, "draw number"], least: float, most: float) -> dict[str, Any]:
    """Values, and the percentiles of the draws, moved by what the mean of the draws is off the value."""
    value, low, high = draws.interval(scores)
    off = scores[1:].nanmean(0).numpy() - value  # NaN, and with it the interval, where there is no value
    limits = {"low": (low - off).clip(least, most), "high": (high - off).clip(least, most)}
    return {"value": value} | limits | {"n": draws.sequences.shape[1]}


def spearman(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    """Spearman's correlation along an axis, 0 where one of both is constant."""
    ranks = [rankdata(z, axis=axis) for z in (a, b)]
    ranks = [z - z.mean(axis, keepdims=True) for z in ranks]
    norm = np.sqrt((ranks[0] ** 2).sum(axis) * (ranks[1] ** 2).sum(axis))
    return np.divide((ranks[0] * ranks[1]).sum(axis), norm, out=np.zeros_like(norm), where=norm > 0)


def states_at(
    trace: Trace,
    sites: Sequence[str] | None,
    untrained: Trace | None,
    skip: int,
    seed: int,
    *,
    shuffled: bool = True,
    head: int | None = None,
) -> Iterator[States]:
    """The hidden states of each site, and of its controls."""
    trace, untrained = distinct(trace), None if untrained is None else distinct(untrained, "untrained")
    if len(trace.tokens) < 2:
        raise ProbeError(f"geometry needs at least 2 distinct sequences, got {len(trace.tokens)}")
    if not 0 <= skip <= int(trace.lengths.max()) - 2:
        raise ProbeError(f"skip must leave at least 2 of {int(trace.lengths.max())} positions, got {skip}")
    if sites is None:
        sites = [site for site, value in trace.values.items() if value.ndim == 3]
    if not sites:
        raise ProbeError(f"geometry wants hidden states at some site, got a trace at: {', '.join(trace.values)}")
    for site in sites:
        x = _at(trace, site, skip, head)
        yield x
        if untrained is not None:
            yield _at(untrained, site, skip, head, control="untrained")
        if shuffled:
            yield _shuffled(x, torch.Generator().manual_seed(seed))


def _at(trace: Trace, site: str, skip: int, head: int | None, control: str = "none") -> States:
    value: Float[Tensor, "batch pos d_model"] = trace.hidden(site) if head is None else trace[site][:, :, head]
    if not value.isfinite().all():
        raise ProbeError(f"values at {site!r} must be finite, got NaN or infinity")
    positions = slice(skip, int(trace.lengths.max()))
    present = valid_rows(trace.lengths, value.shape[1])[:, positions]
    x = value[:, positions].double().where(present[..., None], 0.0)
    n_numbers = present.sum() * x.shape[-1]
    rounding = precision(value.dtype) ** 2 * (x.square().sum() / n_numbers).item()
    still = (x.sum(1) / present.sum(1).clamp(min=1)[:, None])[:, None].where(present[..., None], 0.0)
    if (x - still).square().sum() / n_numbers <= rounding:
        x = still  # states that differ by nothing but rounding have ranks and directions, too, and no position
    return States(site, control, x, present, trace.tokens[:, positions], rounding)


def _shuffled(states: States, generator: torch.Generator) -> States:
    """The same states, permuted within each sequence; padding stays where it is."""
    key = torch.rand(states.present.shape, generator=generator, dtype=torch.float32).masked_fill(
        ~states.present, torch.inf
    )
    order = key.argsort(dim=1, stable=True)
    x = states.x.gather(1, order[..., None].expand_as(states.x))
    return dataclasses.replace(states, control="shuffled", x=x, tokens=states.tokens.gather(1, order))
