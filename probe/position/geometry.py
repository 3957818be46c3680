"""The geometry of position: what part of hidden states it is, in how many dimensions, and how it changes with t.

Every function takes what ``trace`` returns and gives rows; nothing is fitted that a probe could overfit. Beside the
model ("none") stand two controls: "shuffled", the same hidden states at positions that were permuted within each
sequence, and, where its trace is given, "untrained". Positions are 0-based. The first ``skip`` of them are left out:
a ``<bos>`` tells its position by its token.

Intervals of shares are the jackknife's: a draw with replacement repeats sequences, so that its means are noisier than
the sample's. The others are percentiles of such draws, moved by what the draws' mean is off the value.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64, Int
from scipy.stats import rankdata
from torch import Tensor
from torch.linalg import vecdot

from probe.deprecation import old_field
from probe.errors import ProbeError
from probe.position.moments import precision
from probe.position.scores import Draws
from probe.sequences import valid_rows
from probe.shown import Shown
from probe.statistics import N_BOOTSTRAP, jackknife
from probe.tracing import Trace, distinct

PARTS = ("position", "context", "token", "residual")
MOST = 0.95  # the share of the variance of pos_t that its principal components are counted for
GROUPS = 50  # that the jackknife leaves out in turn, where there are more sequences
ATTENTION_OUT = "hook_attn_out"
LIMITS = {"variance": (0, np.inf), "exponent": (-np.inf, np.inf), "exponent_r2": (0, 1)}


@dataclass(frozen=True)
class HiddenDecomposition(Shown):
    """``rows``, one row a number, and ``basis``, where pos_t stands along its principal components, for figures."""

    rows: pd.DataFrame
    basis: pd.DataFrame
    shares = old_field("shares", "rows")


@dataclass(frozen=True)
class _States:
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
    for states in _states(trace, sites, untrained, skip, seed):
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


def _parts(states: _States, times: Float64[Tensor, "batch"]) -> tuple[dict[str, float], Float64[Tensor, "pos d_model"]]:
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


def neighbour_similarity(
    trace: Trace,
    sites: Sequence[str] | None = None,
    *,
    untrained: Trace | None = None,
    max_lag: int | None = None,
    skip: int = 1,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """How alike hidden states k positions apart are. Zuo et al. 2025.

    Metrics, by lag k = 1…max_lag (half of the positions by default, as larger lags have few pairs):

    - "hidden": the mean of cos(h_t, h_{t+k}) over all such pairs within sequences, in [-1, 1];
    - "position_mean": that of cos(pos_t, pos_{t+k}), pos_t the mean over sequences less its mean over positions;

    and "hidden_spearman", "position_mean_spearman" (no lag): Spearman's correlation of these means with -k, in [-1, 1],
    1 where similarity falls at every step. Two means that differ by nothing but noise have ranks, too: read it beside
    its controls and the curve.

    Returns:
        Columns site, control, lag, metric, value, low, high, n (sequences).

    Raises:
        ProbeError: as ``decompose_hidden``, and for a ``max_lag`` that no sequence reaches.
    """
    parts = []
    for states in _states(trace, sites, untrained, skip, seed):
        n_pos = int(states.present.sum(1).max())
        last = max(1, n_pos // 2) if max_lag is None else max_lag
        if not 1 <= last < n_pos:
            raise ProbeError(f"max_lag must lie in 1…{n_pos - 1}, what the longest sequence has, got {max_lag}")
        draws = Draws.of(len(states.x), n_bootstrap, confidence, seed)
        lags = range(1, last + 1)
        unit = torch.nn.functional.normalize(states.x, dim=-1)
        pairs = torch.stack([(states.present[:, k:] & states.present[:, :-k]).sum(1).double() for k in lags], 1)
        alike = torch.stack([(unit[:, k:] * unit[:, :-k]).sum((1, 2)) for k in lags], 1)
        curves = {
            "hidden": (draws.sequences @ alike) / (draws.sequences @ pairs),
            "position_mean": torch.stack([_mean_similarity(states, times, lags) for times in draws.sequences]),
        }
        for metric, scores in curves.items():
            falls = _spearman(scores.numpy().round(12), -np.arange(last)[None], axis=1)  # not the ranks of rounding
            for name, lag, stack in (
                (metric, [*lags], scores),
                (f"{metric}_spearman", [pd.NA], torch.from_numpy(falls)[:, None]),
            ):
                keys = {"site": states.site, "control": states.control, "lag": pd.array(lag, dtype="Int64")}
                parts.append(pd.DataFrame(keys | {"metric": name} | _interval(draws, stack, -1, 1)))
    return pd.concat(parts, ignore_index=True)


def _mean_similarity(states: _States, times: Float64[Tensor, "batch"], lags: range) -> Float64[Tensor, "lag"]:
    seen = (times @ states.present.double()) > 0
    means = states.means(times)[seen]
    unit = torch.nn.functional.normalize(means - means.mean(0), dim=-1)
    cosines = unit @ unit.T
    return torch.stack([cosines.diagonal(k).mean() for k in lags])  # NaN where no pair was drawn


def variance_by_position(
    trace: Trace,
    sites: Sequence[str] | None = None,
    *,
    untrained: Trace | None = None,
    skip: int = 1,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The variance of attention outputs against the number of keys t + 1. Chi et al. 2023: it shrinks, untrained, too.

    Metrics:

    - "variance", by position: over sequences, without bias, averaged over coordinates; unit of the site squared;
    - "exponent" (no position): a of the fit ln variance = b - a ln(t + 1), by least squares over the positions that
      have a variance: 1 for the mean of t + 1 independent values, 0 for a single key, NaN where nothing varies;
    - "exponent_r2": R² of that fit, NaN where the variance is the same everywhere.

    Args:
        sites: full names; by default ``hook_attn_out`` of every layer in the trace. Of a site with heads
            (``attn.hook_z``) each head has its own rows.

    Returns:
        Columns site, head (missing where the site has none), control, position, metric, value, low, high, n
        (sequences).

    Raises:
        ProbeError: as ``decompose_hidden``; the shuffled control is left out.
    """
    if sites is None:
        sites = [site for site in trace.values if site.endswith(ATTENTION_OUT)]
        if not sites:
            raise ProbeError(f"the variance of attention outputs wants a trace at {ATTENTION_OUT!r}, got none of it")
    parts = []
    for site in sites:
        for head in range(trace[site].shape[2]) if trace[site].ndim == 4 else [None]:
            for states in _states(trace, [site], untrained, skip, seed, shuffled=False, head=head):
                draws = Draws.of(len(states.x), n_bootstrap, confidence, seed)
                scores = _variances(states, draws.sequences)
                t = torch.arange(scores.shape[1]) + skip
                keys = {"site": site, "head": pd.array([head], dtype="Int64")[0], "control": states.control}
                stacks = {"variance": scores, **_power_law(scores, (t + 1.0).double())}
                for metric, stack in stacks.items():
                    position = pd.array(t.tolist() if metric == "variance" else [pd.NA], dtype="Int64")
                    least, most = LIMITS[metric]
                    numbers = _interval(draws, stack, least, most)
                    parts.append(pd.DataFrame(keys | {"position": position, "metric": metric} | numbers))
    return pd.concat(parts, ignore_index=True).astype({"head": "Int64"})


def _variances(states: _States, times: Float64[Tensor, "draw batch"]) -> Float64[Tensor, "draw pos"]:
    """The variance at each position in each draw, 0 where rounding made it; NaN of fewer than two sequences."""
    found = []
    for t in range(states.x.shape[1]):
        seen = states.present[:, t]
        x, drawn = states.x[seen, t], times[:, seen]
        count = drawn.sum(1)
        # About the sample's own mean: squares of what is left, and no cancellation.
        x = x - x.mean(0)
        squares = drawn @ x.square().mean(1) - ((drawn @ x).square().mean(1) / count.clamp(min=1))
        variance = squares / (count - 1).clamp(min=1)
        variance = torch.where(variance > states.rounding, variance, 0.0)
        found.append(torch.where(count > 1, variance, torch.nan))
    return torch.stack(found, dim=1)


def _power_law(
    variance: Float64[Tensor, "draw pos"], t: Float64[Tensor, "pos"]
) -> dict[str, Float64[Tensor, "draw 1"]]:
    """The exponent of variance ∝ t^-a and its R², over positions that have a variance."""
    real = variance > 0
    y = torch.where(real, variance, 1.0).log()
    x, n = t.log().expand_as(y), real.sum(1, keepdim=True)
    x, y = (torch.where(real, z - (z * real).sum(1, keepdim=True) / n, 0.0) for z in (x, y))
    slope = (x * y).sum(1, keepdim=True) / x.square().sum(1, keepdim=True)
    spread = y.square().sum(1, keepdim=True)
    r2 = 1 - (y - slope * x).square().sum(1, keepdim=True) / spread.where(spread > 1e-24, torch.nan)
    return {name: torch.where(n > 1, z, torch.nan) for name, z in (("exponent", -slope), ("exponent_r2", r2))}


def position_channels(
    trace: Trace,
    sites: Sequence[str] | None = None,
    *,
    untrained: Trace | None = None,
    top: int = 8,
    skip: int = 1,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The single coordinates of hidden states that go with position.

    The ``top`` coordinates of a site, by the size of their first metric:

    - "spearman": Spearman's correlation of the coordinate with the position within a sequence, averaged over
      sequences, in [-1, 1]; 0 for a coordinate that is constant;
    - "monotone": the share of steps t → t + 1 at which the coordinate's mean over sequences goes that way, in [0, 1].

    The best of many coordinates is good by chance, too: the shuffled control chooses its own best ones.

    Returns:
        Columns site, control, rank (0 is the best), channel, metric, value, low, high, n (sequences).

    Raises:
        ProbeError: as ``decompose_hidden``, and for sequences of fewer than three positions after ``skip``.
    """
    parts = []
    for states in _states(trace, sites, untrained, skip, seed):
        lengths = states.present.sum(1).tolist()
        if min(lengths) < 3:
            raise ProbeError(f"channels want at least {skip + 3} positions a sequence, got {min(lengths) + skip}")
        rho = np.stack([
            _spearman(x[:n].numpy(), np.arange(n)[:, None], axis=0) for x, n in zip(states.x, lengths, strict=True)
        ])  # fmt: skip
        draws = Draws.of(len(rho), n_bootstrap, confidence, seed)
        best = torch.from_numpy(-np.abs(rho.mean(0))).argsort(stable=True)[:top]
        correlation = (draws.sequences @ torch.from_numpy(rho)[:, best]) / len(rho)
        of_best = dataclasses.replace(states, x=states.x[..., best])
        steps = torch.stack([of_best.means(times).diff(dim=0) for times in draws.sequences])
        monotone = (steps * correlation[:1, None].sign() > 0).sum(1).double() / (~steps.isnan()).sum(1)
        for metric, stack in (("spearman", correlation), ("monotone", monotone)):
            keys = {"site": states.site, "control": states.control, "rank": range(len(best)), "channel": best.numpy()}
            parts.append(pd.DataFrame(keys | {"metric": metric} | _interval(draws, stack, -1, 1)))
    return pd.concat(parts, ignore_index=True)


def _interval(draws: Draws, scores: Float64[Tensor, "draw number"], least: float, most: float) -> dict[str, Any]:
    value, low, high = draws.interval(scores)
    off = scores[1:].nanmean(0).numpy() - value  # NaN, and with it the interval, where there is no value
    limits = {"low": (low - off).clip(least, most), "high": (high - off).clip(least, most)}
    return {"value": value} | limits | {"n": draws.sequences.shape[1]}


def _spearman(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    """Spearman's correlation along an axis, 0 where one of both is constant."""
    ranks = [rankdata(z, axis=axis) for z in (a, b)]
    ranks = [z - z.mean(axis, keepdims=True) for z in ranks]
    norm = np.sqrt((ranks[0] ** 2).sum(axis) * (ranks[1] ** 2).sum(axis))
    return np.divide((ranks[0] * ranks[1]).sum(axis), norm, out=np.zeros_like(norm), where=norm > 0)


def _states(
    trace: Trace,
    sites: Sequence[str] | None,
    untrained: Trace | None,
    skip: int,
    seed: int,
    *,
    shuffled: bool = True,
    head: int | None = None,
) -> Iterator[_States]:
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


def _at(trace: Trace, site: str, skip: int, head: int | None, control: str = "none") -> _States:
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
    return _States(site, control, x, present, trace.tokens[:, positions], rounding)


def _shuffled(states: _States, generator: torch.Generator) -> _States:
    """The same states, permuted within each sequence; padding stays where it is."""
    key = torch.rand(states.present.shape, generator=generator, dtype=torch.float32).masked_fill(
        ~states.present, torch.inf
    )
    order = key.argsort(dim=1, stable=True)
    x = states.x.gather(1, order[..., None].expand_as(states.x))
    return dataclasses.replace(states, control="shuffled", x=x, tokens=states.tokens.gather(1, order))
