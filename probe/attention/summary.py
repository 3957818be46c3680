"""How spread out and how far attention is, along a sequence: a few numbers of each row of the patterns."""

from collections.abc import Callable

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor
from torch.special import entr

from probe.attention.comparison import checked_pattern
from probe.attention.distances import with_sink
from probe.statistics import N_BOOTSTRAP, Bootstrap
from probe.tracing import PATTERN, Trace, distinct

Pattern = Float64[Tensor, "batch head query key"]
RowStatistic = Callable[[Pattern], Float64[Tensor, "batch head query"]]


def attention_summary(
    trace: Trace, *, n_bootstrap: int = N_BOOTSTRAP, confidence: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """The mean over sequences of ``ROW_STATISTICS``, for every layer, head and query position.

    A learned sink counts as one more key, without a position: "learned_sink" is its share, in layers that have one.
    entropy is in nats, in [0, ln n_visible]; mean_distance, Σ_i p_i (query - i) / Σ_i p_i, in tokens, in [0, query];
    first, previous and self are the mass on key 0, on the key before the query (0 where there is none), and on its own
    key.    ``low`` and ``high`` are the bootstrap interval over sequences. The dense counterpart of ``stream``.

    Args:
        trace: patterns of every layer. Rows beyond a sequence's length do not count.
        n_bootstrap, confidence, seed: number of draws, coverage in (0, 1), seed of the draws.

    Returns:
        Columns layer, head, query (0-based position), metric, value, low, high, n (sequences that reach the query),
        n_visible (how many keys the query sees: query + 1, or fewer in a layer with a sliding window).

    Raises:
        ProbeError: for values that are no attention patterns, no draw, or a confidence outside (0, 1).
    """
    trace, parts = distinct(trace), []
    for layer in trace.layers_at(PATTERN):
        pattern, n_visible = checked_pattern(trace, layer), trace.n_visible(layer)
        statistics = ROW_STATISTICS | (_WITH_A_SINK if layer in trace.sinks else {})
        for metric, statistic in statistics.items():
            rows = _with_intervals(statistic(pattern), trace.lengths, n_bootstrap, confidence, seed)
            parts.append(rows.assign(layer=layer, metric=metric, n_visible=n_visible.numpy()[rows["query"]]))
    columns = ["layer", "head", "query", "metric", "value", "low", "high", "n", "n_visible"]
    return pd.concat(parts, ignore_index=True)[columns]


def _with_intervals(
    values: Float64[Tensor, "batch head query"], lengths: Tensor, n_bootstrap: int, confidence: float, seed: int
) -> pd.DataFrame:
    parts, start = [], 0
    # The queries between one length and the next are reached by the same sequences: drawn are those.
    for end in lengths.unique().tolist():
        reached = values[lengths >= end, :, start:end]
        n, n_heads, n_query = reached.shape
        bootstrap = Bootstrap.draw(n, n_bootstrap, confidence, seed)
        low, high = bootstrap.interval(bootstrap.means(reached))
        frame = {
            "head": torch.arange(n_heads).repeat_interleave(n_query),
            "query": torch.arange(start, end).repeat(n_heads),
            "value": reached.mean(0).flatten(),
            "low": low.flatten(),
            "high": high.flatten(),
        }
        parts.append(pd.DataFrame(frame).assign(n=n))
        start = end
    return pd.concat(parts, ignore_index=True)


def _mean_distance(pattern: Pattern) -> Float64[Tensor, "batch head query"]:
    position = torch.arange(pattern.shape[-1])
    return (pattern * (position[:, None] - position)).sum(-1)


def _previous(pattern: Pattern) -> Float64[Tensor, "batch head query"]:
    return torch.nn.functional.pad(pattern.diagonal(-1, dim1=-2, dim2=-1), (1, 0))


ROW_STATISTICS: dict[str, RowStatistic] = {
    "entropy": lambda pattern: entr(pattern).sum(-1),
    "mean_distance": _mean_distance,
    "first": lambda pattern: pattern[..., 0],
    "previous": _previous,
    "self": lambda pattern: pattern.diagonal(dim1=-2, dim2=-1),
}

# What differs in a layer with a learned sink: it is one more key, and it stands at no position.
_WITH_A_SINK: dict[str, RowStatistic] = {
    "entropy": lambda pattern: entr(with_sink(pattern)).sum(-1),
    "mean_distance": lambda pattern: _mean_distance(pattern) / pattern.sum(-1).clamp(min=1e-300),
    "learned_sink": lambda pattern: 1 - pattern.sum(-1),
}
