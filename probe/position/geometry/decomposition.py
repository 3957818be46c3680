"""What part of hidden states position is, and in how many dimensions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float64, Int
from torch import Tensor
from torch.linalg import vecdot

from probe.deprecation import old_field
from probe.position.geometry.states import States, states_at
from probe.shown import Shown
from probe.statistics import jackknife
from probe.tracing import Trace

PARTS = ("position", "context", "token", "residual")
MOST = 0.95  # the share of the variance of pos_t that its principal components are counted for
GROUPS = 50  # that the jackknife leaves out in turn, where there are more sequences


@dataclass(frozen=True)
class HiddenDecomposition(Shown):
    """``rows``, one row a number, and ``basis``, where pos_t stands along its principal components, for figures."""

    rows: pd.DataFrame
    basis: pd.DataFrame
    shares = old_field("shares", "rows")


def decompose_hidden(
    trace: Trace,
    sites: Sequence[str] | None = None,
    *,
    untrained: Trace | None = None,
    skip: int = 1,
    components: int = 3,
    confidence: float = 0.95,
    seed: int = 0,
) -> HiddenDecomposition:
    """Split hidden states, h(c, t) = μ + pos_t + ctx_c + tok_x + residual, x the token at t of sequence c.

    Song & Zhong 2023, section 2: μ is the mean, pos_t the mean of h - μ at position t, ctx_c the mean over sequence c
    of what that leaves; their residual is split once more, into the means over equal tokens and the rest. Each is the
    group mean of what those before it leave, so the squares add up, with lengths that differ, too.

    A mean of n sequences carries 1/n of the variance of what varies from sequence to sequence. So pos_t has squares
    where there is no position: Σ_t (1 - n_t / N) s², with n_t sequences at t, N tokens in all, and s² the unbiased
    variance of what pos_t and ctx_c leave, with N - T - C + 1 degrees of freedom for T positions and C sequences (as in
    an analysis of variance). These squares are not position's, and are counted with the residual.

    Metrics:

    - "share_position", "share_context", "share_token", "share_residual": of Σ ‖h - μ‖², sum 1. "share_position" is
      unbiased, so that without position it lies about 0, and as often below;
    - "participation_ratio": (Σ λ)² / Σ λ², λ the eigenvalues of the covariance of pos_t, in [1, d_model];
    - "components_95": the least number of principal components with 95 % of the variance of pos_t.

    Where pos_t is what rounding made, the last two are NaN; where h - μ is, all are.

    Args:
        trace: of two sequences or more, at the sites asked for.
        sites: full names; by default every site of the trace that holds hidden states.
        untrained: a trace of an untrained model of the same shape, for its control.
        skip: positions at the front to leave out.
        components: how many principal components ``basis`` has.
        confidence: coverage of the intervals, in (0, 1): the jackknife's over sequences with Student's t, missing for 2
            sequences.
        seed: of the shuffled control.

    Returns:
        ``rows`` with the columns site, control, metric, value, low, high, n (sequences), and ``basis`` with site,
        control, component, share (of the variance of pos_t), position, value (the coordinate of pos_t along that
        component).

    Raises:
        ProbeError: for fewer than two sequences, fewer than two positions after ``skip``, hidden states that are not
            finite, or a site that the trace has not.
    """
    shares, basis = [], []
    for states in states_at(trace, sites, untrained, skip, seed):
        n, keys = len(states.x), {"site": states.site, "control": states.control}
        found, pos = _parts(states, torch.ones(n, dtype=torch.float64))
        group = torch.arange(n) % min(n, GROUPS)
        without = [_parts(states, (group != g).double())[0] for g in group.unique()] if n > 2 else []
        for metric, value in found.items():
            most = 1.0 if metric.startswith("share") else math.inf
            interval = jackknife(value, [each[metric] for each in without], confidence).within(-math.inf, most)
            limits = {"value": value, "low": interval.low, "high": interval.high, "n": n}
            shares.append(keys | {"metric": metric} | limits)
        if states.control != "shuffled":
            basis.append(_basis(pos, components).assign(**keys).assign(position=lambda r: r.position + skip))
    columns = ["site", "control", "component", "share", "position", "value"]
    return HiddenDecomposition(pd.DataFrame(shares), pd.concat(basis, ignore_index=True)[columns])


def _parts(states: States, times: Float64[Tensor, "batch"]) -> tuple[dict[str, float], Float64[Tensor, "pos d_model"]]:
    """The numbers of a decomposition, and pos_t times the root of its weight; a sequence counts so many times."""
    x, groups = states.rows
    weight = times[groups[1]]
    rest = x - (weight @ x) / weight.sum()
    by_rounding = states.rounding * weight.sum() * x.shape[-1]
    total = weight @ vecdot(rest, rest)
    total = total if total > by_rounding else torch.tensor(torch.nan)
    found = {}
    for part, group in zip(PARTS, groups, strict=False):
        means, of_group = _group_means(rest, weight, group)
        rest -= means[group]
        found[f"share_{part}"] = ((of_group @ vecdot(means, means)) / total).item()
        if part == "position":
            pos, at_position = means * of_group.sqrt()[:, None], of_group
        elif part == "context":
            n, n_free = weight.sum(), weight.sum() - (at_position > 0).sum() - (of_group > 0).sum() + 1
            variance = (weight @ vecdot(rest, rest)) / n_free.clamp(min=1)
            by_chance = ((1 - at_position / n)[at_position > 0].sum() * variance / total).item()
    found["share_position"] -= by_chance
    found["share_residual"] = ((weight @ vecdot(rest, rest)) / total).item() + by_chance
    spectrum = torch.linalg.svdvals(pos).square()
    spectrum = spectrum if spectrum.sum() > by_rounding else spectrum * torch.nan
    running = spectrum.cumsum(0) / spectrum.sum()
    found["participation_ratio"] = (spectrum.sum().square() / spectrum.square().sum()).item()
    found["components_95"] = float((running < MOST).sum() + 1) if running.isfinite().all() else torch.nan
    return found, pos / weight.sum().sqrt()


def _group_means(
    x: Float64[Tensor, "row feature"], weight: Float64[Tensor, "row"], group: Int[Tensor, "row"]
) -> tuple[Float64[Tensor, "group feature"], Float64[Tensor, "group"]]:
    """The weighted mean of each group of rows, 0 for one without weight, and the weight of each."""
    n = int(group.max()) + 1
    total = x.new_zeros(n, x.shape[1]).index_add_(0, group, x * weight[:, None])
    of_group = x.new_zeros(n).index_add_(0, group, weight)
    return total / of_group.clamp(min=1)[:, None], of_group


def _basis(pos: Float64[Tensor, "pos d_model"], components: int) -> pd.DataFrame:
    U, S, _ = torch.linalg.svd(pos, full_matrices=False)
    # The sign of a component is free: here the last position is on its positive side.
    along = (U * S)[:, :components]
    along = along * torch.where(along[-1] < 0, -1.0, 1.0)
    share = S.square() / S.square().sum()
    parts = [
        {"component": c, "share": share[c].item(), "position": range(len(pos)), "value": along[:, c].numpy()}
        for c in range(along.shape[1])
    ]
    return pd.concat([pd.DataFrame(part) for part in parts])
