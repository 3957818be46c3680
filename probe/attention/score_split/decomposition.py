"""Theorem 2 taken from a real head: its scores split into a part by key, by query, by distance, and content.

    s(t, i) = μ + f_abs(i) + g(t) + f_rel(t - i) + content

Kazemnejad et al. 2023, Theorem 2, promises heads whose scores are f_cnt(content) + f_rel(t - i). One linear freedom is
in no data: -m(t - i) = -mt + mi, so a linear f_rel is as well an absolute bias on keys plus something by query, and
softmax does not see what depends on the query alone. By convention the linear trend belongs to f_rel here: f_abs has no
slope over the keys 1…T-1 (key 0, where a sink would stand, has no say). Hence ALiBi is found as f_rel(d) = -md, and is
as well the absolute bias mi on keys.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor, nn

from probe.attention.score_split.design import Design, PairCounts
from probe.attention.score_split.parts import Curves, Left, Stacks, or_nan, settled, share_rows, subsets, with_interval
from probe.attention.score_split.sums import PARTS, ScoreSums
from probe.attention.streaming.models import attention_inputs
from probe.deprecation import old_field
from probe.errors import ProbeError, unknown_name
from probe.models.hidden_keys import nearest_keys
from probe.models.protocol import AttentionInputs
from probe.sequences import Sequences, TokenIds, valid_rows
from probe.shown import Shown
from probe.statistics import N_BOOTSTRAP, Bootstrap
from probe.tracing import SCORES, Trace, distinct

CONTENT = ("none", "pair")
SEEN_PARTS = ("key", "distance", "content")  # within rows, where pairs of tokens are fitted


@dataclass(frozen=True)
class ScoreSplit(Shown):
    """The split of every head.

    ``rows``: columns layer, head, scope, part, metric, value, low, high, n (sequences), content. For the metric
    "share" the values of a scope sum to 1; they are Lindeman, Merenda & Gold's (1980): the variance that a part
    explains beyond others, averaged over all orders in which the parts can be added, since parts of an unbalanced
    design overlap.

    - scope "all": of the variance of all scores; parts key, query, distance, (content,) residual;
    - scope "seen": of the variance within rows: of each score less the mean of its row, in its sequence. Softmax sees
      nothing else: a constant added to a row changes no pattern, and no number here. There is no part query.

    Further metrics, of part "distance": "toeplitz_r2", the share of the variance that f_rel alone explains within rows
    (scope "seen") and that of the mean scores, from which content is averaged out (scope "mean", not of long contexts);
    "slope", that of -f_rel over distances in nats per token (m of ALiBi); "alibi_r2", "logarithm_r2", "t5_r2", how much
    of f_rel's variance over cells a line, a multiple of ln(1 + d), and T5's 32 buckets explain. A share of a variance
    that is none beside that of all scores (below 1e-12 of it, as rounding leaves) is NaN; of a head whose scores are
    all equal, every number is.

    ``curves``: columns layer, head, curve ("f_abs", "g", "f_rel"; "f_rel_alibi" and "f_rel_t5", the line and the T5
    bias nearest to f_rel; "t5_bucket", that bias by bucket), index (key, query, distance or bucket, 0-based), value,
    low, high (nats). All but the last have mean 0 over cells.

    ``low`` and ``high`` are bootstrap intervals over sequences: of shares with the fitted split held fixed, of curves
    and slopes to first order in the weights of the sequences; NaN where there is one sequence only.
    """

    rows: pd.DataFrame
    curves: pd.DataFrame
    shares = old_field("shares", "rows")


def split_scores(
    trace: Trace,
    content: str = "none",
    *,
    layers: Sequence[int] | None = None,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> ScoreSplit:
    """Split the scores of every head by least squares over all cells of all sequences that are seen: i ≤ t, and in a
    layer with a sliding window t - window < i ≤ t.

    Args:
        trace: scores of the layers (site ``SCORES``), -inf at hidden keys and finite at all others.
        content: "none" leaves content in the residual, where its mean over sequences adds noise to the other parts;
            "pair" fits one value for each pair of a query's and a key's token besides. In the first layer of a model
            whose scores are content plus a bias, that is exact: f_rel is the bias, up to its constant.
        layers: by default all that the trace holds scores of.

    Raises:
        ProbeError: for sequences of one token only, scores that are not finite, or equal in every head, fewer than 4
            cells a pair (content "pair" would then explain anything), an unknown content, or no scores in the trace.
    """
    if content not in CONTENT:
        raise unknown_name("content", content, CONTENT)
    trace = distinct(trace)
    n_position = int(trace.lengths.max())
    if n_position < 2:
        raise ProbeError("a split of scores wants sequences of at least 2 tokens, got sequences of 1")
    bootstrap = Bootstrap.draw(len(trace.tokens), n_bootstrap, confidence, seed)
    n = len(trace.tokens)
    weights, parts = bootstrap.value_and_draws if n > 1 else None, []
    design = None
    for layer in trace.layers_at(SCORES) if layers is None else layers:
        n_visible = trace.n_visible(layer)[:n_position]
        seen = valid_rows(trace.lengths, n_position)[..., None] & nearest_keys(n_visible)
        if design is None or not torch.equal(design.n_visible, n_visible):  # most layers hide the same keys
            design = _design(trace, content, n_visible, seen)
        cells = _checked_scores(trace, layer, seen)
        squares = cells.square().sum((-2, -1))
        right = _right_sides(cells, trace.lengths, design)
        mean = _mean(right, design)
        left: dict[tuple[str, ...], Tensor] = {(): squares - 2 * mean * right[..., :n_position].sum(-1)}
        left[()] += mean.square() * design.cells_of_each[:, None]
        constant = _constant(left[()].sum(0), squares.sum(0))
        for subset in subsets(_parts(design)):
            theta = design.solve(right.sum(0), subset)
            residual = (cells - design.fitted(theta)).where(seen[:, None], 0.0)
            left[subset] = residual.square().sum((-2, -1))
        if design.pairs is None:
            within_rows, unexplained = _within_rows(left, right, design), _right_sides(residual, trace.lengths, design)
        else:
            within_rows, theta, unexplained = _solved_within_rows(cells, seen, right, trace.lengths, design)
        basis = settled(theta, design)[None]  # the last subset holds all parts
        if weights is not None:
            basis = torch.cat((basis, _pull(unexplained, right, design)))
        curves = Curves(basis, weights, design)
        shares = share_rows(left, within_rows, weights) | _toeplitz_of_means(left, cells, design)
        shares |= curves.shape(left[()].sum(0))
        parts.append((layer, _or_nan(shares, constant), curves))
    return _collected(parts, bootstrap if n > 1 else None, n, content)


def split_long_context(
    model: nn.Module,
    tokens: TokenIds,
    *,
    layers: Sequence[int] | None = None,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> ScoreSplit:
    """The same split at any length, straight from the queries and keys of a ``Decoder`` (or, as far as it can run, of a
    ``TransformerBridge``): exactly the least squares over all scores, in O(T log T) time and O(T) memory, for the sums
    that least squares asks for follow from q and k (``ScoreSums.of_queries_and_keys``). Content stays in the residual.

    Raises:
        ProbeError: for sequences of one token, values that are not finite, or constant scores.
    """
    ids = Sequences.of(tokens).distinct().tokens
    found: dict[int, list[ScoreSums]] = {}

    def visit(layer: int, inputs: AttentionInputs) -> None:
        for q, k in zip(inputs.q, inputs.k, strict=True):
            sums = ScoreSums.of_queries_and_keys(q, k, inputs.scale, inputs.bias, inputs.window)
            found.setdefault(layer, []).append(sums)

    for sequence in ids.split(1):
        attention_inputs(model, sequence, visit, layers)
    bootstrap = Bootstrap.draw(len(ids), n_bootstrap, confidence, seed)
    return split_sums({layer: ScoreSums.together(parts) for layer, parts in found.items()}, bootstrap)


def split_sums(sums: Mapping[int, ScoreSums], bootstrap: Bootstrap | None = None) -> ScoreSplit:
    """The same split from the sums of each layer, over sequences of one length; intervals where there are several
    sequences and draws of them.

    Raises:
        ProbeError: for sequences of one token, or constant scores.
    """
    parts, n = [], 1
    for layer, of_layer in sums.items():
        n, _, _, n_position = of_layer.sums.shape
        if n_position < 2:
            raise ProbeError("a split of scores wants sequences of at least 2 tokens, got sequences of 1")
        n_visible = torch.arange(1, n_position + 1).clamp(max=of_layer.window or n_position)
        design = Design(torch.full((n,), n_position), n_position, n_visible=n_visible)
        right, weights = of_layer.sums.flatten(-2), None if n == 1 or bootstrap is None else bootstrap.value_and_draws
        mean = _mean(right, design)
        squares = of_layer.squares - 2 * mean * right[..., :n_position].sum(-1) + mean**2 * design.n_cells / n
        left: dict[tuple[str, ...], Tensor] = {(): squares}
        constant = _constant(left[()].sum(0), of_layer.squares.sum(0))
        for subset in subsets(PARTS):
            theta = design.solve(right.sum(0), subset)
            # |s_b - X_b θ|²; with one length X_bᵀX_b is XᵀX / n of every sequence.
            own = (theta * design.apply(theta)).sum(-1) / n
            left[subset] = of_layer.squares - 2 * (theta * right).sum(-1) + own
        unexplained = right - design.apply(theta) / n
        basis = settled(theta, design)[None]
        if weights is not None:
            basis = torch.cat((basis, _pull(unexplained, right, design)))
        curves = Curves(basis, weights, design)
        shares = share_rows(left, _within_rows(left, right, design), weights)
        shares |= curves.shape(left[()].sum(0))
        parts.append((layer, _or_nan(shares, constant), curves))
    return _collected(parts, bootstrap if n > 1 else None, n, "none")


def _design(
    trace: Trace, content: str, n_visible: Int[Tensor, "position"], seen: Bool[Tensor, "sequence query key"]
) -> Design:
    pairs = PairCounts.of(trace.tokens[:, : len(n_visible)], seen) if content == "pair" else None
    design = Design(trace.lengths, len(n_visible), pairs, n_visible)
    if pairs is not None and design.n_cells < 4 * len(pairs):
        raise ProbeError(
            f"content 'pair' wants at least 4 cells a pair of tokens, got {design.n_cells:.0f} cells of {len(pairs)} "
            "pairs: trace more sequences, or leave content in the residual ('none')"
        )
    return design


def _pull(
    unexplained: Float64[Tensor, "sequence head unknown"],
    right: Float64[Tensor, "sequence head unknown"],
    design: Design,
) -> Float64[Tensor, "sequence head part=3 position"]:
    """How the parts move with the weight of each sequence: (XᵀX)⁻¹ X_bᵀ (s_b - X_b θ), within rows where θ is."""
    n, centred = len(right), design.pairs is not None
    unexplained, beside = unexplained.flatten(0, 1), right.sum(0).repeat(n, 1)
    pull = design.solve(unexplained, SEEN_PARTS if centred else PARTS, beside, centred)
    return settled(design.with_queries(pull, unexplained) if centred else pull, design).unflatten(0, (n, -1))


def _parts(design: Design) -> tuple[str, ...]:
    return PARTS if design.pairs is None else (*PARTS, "content")


def _within_rows(left: Left, right: Float64[Tensor, "sequence head unknown"], design: Design) -> Left:
    """What is left of each score less the mean of its row, without pairs.

    Every sequence has the same X, so that what remains in a row, beside key_i and distance_{t-i}, has the mean
    m_bt - m_t in sequence b, where m_bt is the row's mean score and m_t that over the sequences: query_t takes m_t.
    Σ_t r_t (m_bt - m_t)² of the squares that the parts leave beside query_t are constants of rows, and no more.
    """
    means = right[..., design.n : 2 * design.n] / design.n_visible
    apart = (means - means.sum(0) / design.weights).where(design.valid[:, None], 0.0)
    constants = (apart.square() * design.n_visible).sum(-1)
    return {
        tuple(p for p in subset if p != "query"): each - constants for subset, each in left.items() if "query" in subset
    }


def _solved_within_rows(
    cells: Float64[Tensor, "sequence head query key"],
    seen: Bool[Tensor, "sequence query key"],
    right: Float64[Tensor, "sequence head unknown"],
    lengths: Int[Tensor, "sequence"],
    design: Design,
) -> tuple[Left, Tensor, Tensor]:
    """What is left within rows where pairs of tokens are fitted too; the best θ there, with the query_t beside it; and
    the right sides of what θ leaves: the query's of whole scores, all others of scores within rows.

    Sequences have other pairs in the same row, so that the rows are centred, in cells and in X, before θ is solved for.
    """

    def centre(x: Float64[Tensor, "#sequence head query key"]) -> Tensor:
        x = x.where(seen[:, None], 0.0)
        return (x - x.sum(-1, keepdim=True) / design.n_visible[:, None]).where(seen[:, None], 0.0)

    centred = centre(cells)
    sides = _right_sides(centred, lengths, design)
    left: dict[tuple[str, ...], Tensor] = {(): centred.square().sum((-2, -1))}
    for subset in subsets(SEEN_PARTS):
        theta = design.solve(sides.sum(0), subset, beside=right.sum(0), centred=True)
        residual = centred - centre(design.fitted(theta))
        left[subset] = residual.square().sum((-2, -1))
    theta, unexplained = design.with_queries(theta, right.sum(0)), _right_sides(residual, lengths, design)
    whole = (cells - design.fitted(theta)).where(seen[:, None], 0.0)
    unexplained[..., design.n : 2 * design.n] = whole.sum(-1)
    return left, theta, unexplained


def _right_sides(cells: Tensor, lengths: Tensor, design: Design) -> Float64[Tensor, "sequence head unknown"]:
    sums = ScoreSums.of_scores(cells, lengths).sums.flatten(-2)
    return sums if design.pairs is None else torch.cat((sums, design.pairs.sums(cells)), dim=-1)


def _mean(right: Float64[Tensor, "sequence head unknown"], design: Design) -> Float64[Tensor, "head"]:
    """μ, the mean score over all cells."""
    return right[..., : design.n].sum((0, -1)) / design.n_cells


def _checked_scores(
    trace: Trace, layer: int, seen: Bool[Tensor, "sequence query key"]
) -> Float64[Tensor, "sequence head query key"]:
    n_position, seen = seen.shape[-1], seen[:, None]
    scores = trace.scores(layer)[..., :n_position, :n_position]
    bad = seen & ~scores.isfinite()
    if bad.any():
        b, h, t, i = bad.nonzero()[0].tolist()
        raise ProbeError(
            f"scores must be finite where the key is seen, but layer {layer}, sequence {b}, head {h}, query {t}, key "
            f"{i} holds {float(scores[b, h, t, i])}"
        )
    return scores.double().where(seen, 0.0)


def _constant(variance: Float64[Tensor, "head"], squares: Float64[Tensor, "head"]) -> Bool[Tensor, "head"]:
    """Whether all scores of a head are equal but for rounding."""
    return variance <= 1e-12 * squares


def _or_nan(shares: Stacks, constant: Bool[Tensor, "head"]) -> Stacks:
    """NaN for the heads that have nothing to split."""
    return {key: stack.where(~constant, math.nan) for key, stack in shares.items()}


def _toeplitz_of_means(left: Mapping[tuple[str, ...], Tensor], cells: Tensor, design: Design) -> Stacks:
    """What f_rel explains of the mean scores' variance within rows."""
    reached, sums = design.weights, cells.sum(0)
    means = sums / reached[:, None]
    rows = means.sum(-1, keepdim=True) / design.n_visible[:, None]
    seen = nearest_keys(design.n_visible)
    variance = ((means - rows).where(seen, 0.0).square() * reached[:, None]).sum((-2, -1))
    explained = (left["query",] - left["query", "distance"]).sum(0)
    return {("mean", "distance", "toeplitz_r2"): explained[None] / or_nan(variance[None], left[()].sum(0)[None])}


def _collected(
    parts: Sequence[tuple[int, Stacks, Curves]], bootstrap: Bootstrap | None, n: int, content: str
) -> ScoreSplit:
    if all(stack.isnan().all() for _, metrics, _ in parts for stack in metrics.values()):
        raise ProbeError("scores must vary, but those of every head are all equal: there is nothing to split")
    shares = []
    for layer, metrics, _ in parts:
        for (scope, part, metric), stack in metrics.items():
            heads = {"layer": layer, "head": range(stack.shape[1]), "scope": scope, "part": part, "metric": metric}
            shares.append(pd.DataFrame(heads | with_interval(stack, bootstrap)).assign(n=n, content=content))
    curves = [of_layer.rows(bootstrap).assign(layer=layer) for layer, _, of_layer in parts]
    order = ["layer", "head"]
    return ScoreSplit(*(pd.concat(p).sort_values(order, kind="stable", ignore_index=True) for p in (shares, curves)))
