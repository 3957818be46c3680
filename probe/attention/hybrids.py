"""Models in which some layers see position and others do not: what heads of either kind attend to.

Yang et al. 2025, "Rope to Nope and Back Again: A New Hybrid Attention Strategy": layers without positions retrieve,
rotary layers stay local.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float64
from torch import Tensor, nn

from probe.attention.comparison import checked_pattern
from probe.config import check_size
from probe.errors import ProbeError
from probe.models.anatomy import layer_encodings
from probe.models.hidden_keys import nearest_keys
from probe.sequences import Integers, Sequences, TokenIds, first_of_each, marked, valid_rows
from probe.statistics import N_BOOTSTRAP, Bootstrap
from probe.tracing import PATTERN, trace

BY_HEAD = ("layer", "head", "layer_encoding", "metric", "value")


def attention_on(
    model: nn.Module,
    tokens: TokenIds,
    keys: Bool[Tensor, "batch marked_pos"],
    queries: Bool[Tensor, "batch looking_pos"],
    *,
    lengths: Integers | None = None,
    window: int = 16,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
    batch_size: int = 16,
) -> pd.DataFrame:
    """What every head attends to from the marked queries: a needle, the first token, the neighbourhood, the rest.

    Metrics, sums of attention in [0, 1], means over the marked queries of each sequence, then over sequences:

    - "on_keys": on the marked keys;
    - "on_first": on key 0, where that is not marked;
    - "on_recent": on the last ``window`` keys, the query's own among them, but for those above;
    - "on_sink", in layers with a learned sink (see ``Trace.sink_mass``): the share that it takes;
    - "elsewhere": on all others. All of these add up to 1;
    - "on_keys_uniform": what uniform attention over the keys that the layer shows has on the marked ones: the control,
      0 where a sliding window hides all of them;
    - "reach": Σ_i p_i (t - i) / (t / 2), the mean attended distance compared with that of uniform attention on all keys
      up to the query's own, in [0, 2].

    Args:
        model: any that ``trace`` reads.
        keys: the needle. A marked key in the future of a query does not count for it.
        queries: the tokens that look for it; at least one a sequence, none of them the first.

    Returns:
        Columns layer, head, layer_encoding, metric, value, low, high, n (sequences); bootstrap over sequences.

    Raises:
        ProbeError: for masks of other shapes than the tokens, or a sequence without a query, or with one that sees no
            marked key.
    """
    check_size("window", window)
    sequences = Sequences.of(tokens, lengths)
    keys, queries = marked("keys", keys, sequences.tokens), marked("queries", queries, sequences.tokens)
    kept = first_of_each(sequences.tokens, sequences.lengths, keys, queries)
    sequences, keys, queries = sequences[kept], keys[kept], queries[kept]
    traced = trace(model, sequences.tokens, [PATTERN], lengths=sequences.lengths, batch_size=batch_size)
    n, length = traced.tokens.shape
    queries = queries & valid_rows(traced.lengths, length)
    position = torch.arange(length)
    seen = position[:, None] >= position  # query, key
    needle = keys[:, None] & seen
    if not queries.any(1).all() or queries[:, 0].any() or not needle.any(-1)[queries].all():
        raise ProbeError("every sequence must have a marked query behind its first token that sees a marked key")
    first = (position == 0) & ~needle
    recent = (position[:, None] - position < window) & seen & ~needle & ~first
    bootstrap = Bootstrap.draw(n, n_bootstrap, confidence, seed)
    n_queries = queries.sum(1).double()
    distance = (position[:, None] - position).double() / (position[:, None] / 2).clamp(min=0.5)

    def mean(by_query: Float64[Tensor, "batch #head query"]) -> Float64[Tensor, "draw #head"]:
        by_sequence = by_query.where(queries[:, None], 0.0).sum(-1) / n_queries[:, None]
        return bootstrap.value_and_draws @ by_sequence

    encodings, parts = layer_encodings(model), []
    for layer in traced.layers_at(PATTERN):
        pattern = checked_pattern(traced, layer)
        on = {
            name: mean((pattern * mask[:, None]).sum(-1))
            for name, mask in (("on_keys", needle), ("on_first", first), ("on_recent", recent))
        }
        if layer in traced.sinks:
            on["on_sink"] = mean(1 - pattern.sum(-1))
        on["elsewhere"] = 1 - sum(on.values(), start=torch.zeros(()))
        n_visible = traced.n_visible(layer)
        uniform = (needle & nearest_keys(n_visible)).sum(-1).double() / n_visible
        on["on_keys_uniform"] = mean(uniform[:, None]).expand_as(on["on_keys"])
        on["reach"] = mean((pattern * distance).sum(-1))
        for metric, draws in on.items():
            low, high = bootstrap.interval(draws[1:])
            heads = {"head": range(draws.shape[1]), "value": draws[0], "low": low, "high": high}
            keys_of = {"layer": layer, "layer_encoding": encodings[layer], "metric": metric}
            parts.append(pd.DataFrame(keys_of | heads))
    columns = ["layer", "head", "layer_encoding", "metric", "value", "low", "high"]
    return pd.concat(parts, ignore_index=True)[columns].assign(n=n)


def by_layer_encoding(
    rows: pd.DataFrame,
    metrics: Sequence[str] | None = None,
    *,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Means over the heads of the layers that see an encoding and of those that see none, and their difference.

    Intervals are over heads, drawn with replacement among those of their kind: they say how far heads differ, nothing
    of other seeds; heads of one layer are no independent draws.

    Args:
        rows: with the columns of ``BY_HEAD``, as ``census`` and ``attention_on`` have them; one row a head and metric.
        metrics: those to take; by default all.

    Returns:
        Columns layer_encoding ("none", "rotary", …; "none - rotary" for a difference), metric, value, low, high, n (the
        heads of that kind; of a difference those without positions). A model whose layers are all of one kind has one
        row a metric.

    Raises:
        ProbeError: for a column or a metric that is missing, or two rows of one head.
    """
    for column in BY_HEAD:
        if column not in rows:
            raise ProbeError(f"rows by head have the columns {', '.join(BY_HEAD)}; {column!r} is missing")
    there = list(dict.fromkeys(rows["metric"]))
    for metric in metrics or there:
        if metric not in there:
            raise ProbeError(f"rows of the metric {metric!r} were wanted, got {', '.join(there)}")
    found = []
    for metric in metrics or there:
        part = rows[rows["metric"] == metric]
        if part.duplicated(["layer", "head"]).any():
            raise ProbeError(f"one row a head was wanted of {metric!r}, got two: take one model and one control")
        heads = {kind: torch.tensor(of["value"].to_numpy()) for kind, of in part.groupby("layer_encoding")}
        # Other draws for each kind: their heads are not paired.
        by_kind = {
            kind: Bootstrap.draw(len(values), n_bootstrap, confidence, seed + i)
            for i, (kind, values) in enumerate(heads.items())
        }
        draws = {kind: by_kind[kind].value_and_draws @ values for kind, values in heads.items()}
        for kind in [kind for kind in draws if kind != "none"] if "none" in draws else []:
            draws[f"none - {kind}"] = draws["none"] - draws[kind]
        for kind, each in draws.items():
            low, high = by_kind[kind.split(" - ")[0]].interval(each[1:])
            n = len(heads[kind.split(" - ")[0]])
            found.append((kind, metric, float(each[0]), float(low), float(high), n))
    return pd.DataFrame(found, columns=["layer_encoding", "metric", "value", "low", "high", "n"])
