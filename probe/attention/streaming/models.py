"""Streaming statistics of a model's own attention: its queries and keys as they are computed, one layer at a time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from probe.attention.streaming.statistics import StreamedAttention, stream_attention
from probe.attention.streaming.template import StreamTemplate
from probe.errors import ProbeError
from probe.models.mode import evaluating
from probe.models.open.ways import as_model
from probe.models.protocol import AttentionInputs, Visit
from probe.sequences import Integers, Sequences, TokenIds, check_ids, token_ids
from probe.shown import Shown


@torch.no_grad()
def attention_inputs(model: nn.Module, tokens: TokenIds, visit: Visit, layers: Sequence[int] | None = None) -> None:
    """Run a model once and call ``visit(layer, inputs)`` at each layer's attention; nothing is kept.

    A decoder and a model of transformers run by fused attention and stop at the last of the layers: memory grows with
    the length, not with its square. A bridge holds every pattern, so it goes only as far as it can run.

    Args:
        model: any model with attention.
        tokens: ids "batch pos".
        visit: called at each layer, in order.
        layers: those to visit; by default all that have attention.

    Raises:
        ProbeError: for a layer that does not exist or has no attention, a model without any, or one whose pattern does
            not follow from its queries and keys (a bias, a cap or a sink) or is no softmax (entmax).
    """
    view, ids = as_model(model), token_ids(tokens)
    n_layers = len(view.anatomy.layers)
    check_ids(ids, view.anatomy.d_vocab)
    attending = [i for i, layer in enumerate(view.anatomy.layers) if layer.attends]
    layers = attending if layers is None else sorted({*layers})
    if not layers or not {*layers} <= {*attending}:
        raise ProbeError(f"layers must be some of {attending}, those of {n_layers} that have attention, got {layers}")
    with evaluating(model):
        view.attention_inputs(ids, visit, layers)


@dataclass(frozen=True)
class ModelStream(Shown):
    """Streaming statistics by layer. Their tensors have a batch axis in front: "batch head query".

    Rows beyond a sequence's length are NaN; the histogram has zeros at distances that it does not reach.
    """

    layers: dict[int, StreamedAttention]  #: by layer
    windows: dict[int, int | None] = field(default_factory=dict)  #: by layer, how many keys a query sees at most

    def rows(self, n_bins: int = 256) -> pd.DataFrame:
        """Means over sequences and over bins of query positions, ready to be drawn.

        Returns:
            Columns layer, head, query (the mean position of a bin), metric (entropy in nats; mean_distance in tokens;
            first, previous and self, masses; of each template kl = KL(P‖T), reverse_kl, symmetric_kl and perhaps
            jensen_shannon, in nats), template (None where there is none), value, n (rows in the mean), and n_visible
            (how many keys the query sees).
        """
        parts = []
        for layer, result in self.layers.items():
            values: dict[tuple[str, str | None], Tensor] = {("entropy", None): result.entropy}
            values |= {("mean_distance", None): result.mean_distance}
            values |= {("first", None): result.first, ("previous", None): result.previous, ("self", None): result.self_}
            for name, divergence in result.divergence.items():
                for metric in ("kl", "reverse_kl", "symmetric_kl", "jensen_shannon"):
                    value = getattr(divergence, metric)
                    if value is not None:
                        values[metric, name] = value
            for (metric, template), value in values.items():
                keys = {"layer": layer, "metric": metric, "template": template}
                parts.append(_pooled(value, "query", n_bins).assign(**keys))
        rows = pd.concat(parts, ignore_index=True)
        widest = rows["layer"].map(lambda layer: self.windows.get(layer) or math.inf)
        columns = ["layer", "head", "query", "metric", "template", "value", "n", "n_visible"]
        return rows.assign(n_visible=(rows["query"] + 1).clip(upper=widest))[columns]

    def histogram_rows(self, n_bins: int = 256) -> pd.DataFrame:
        """Mean mass per token of distance, in bins of distances; columns layer, head, distance, value, n.

        Raises:
            ProbeError: where no histogram was asked for.
        """
        parts = []
        for layer, result in self.layers.items():
            if result.histogram is None:
                raise ProbeError("there is no histogram in this stream: make it with histogram=True")
            parts.append(_pooled(result.histogram, "distance", n_bins).assign(layer=layer))
        return pd.concat(parts, ignore_index=True)[["layer", "head", "distance", "value", "n"]]


def _pooled(value: Float[Tensor, "batch head column"], column: str, n_bins: int) -> pd.DataFrame:
    if n_bins < 1:
        raise ProbeError(f"n_bins must be at least 1, got {n_bins}")
    _, n_heads, n = value.shape
    value = value.double().cpu()
    counted = ~value.isnan()
    n_bins = min(n_bins, n)
    bin_ = torch.arange(n) * n_bins // n
    count = torch.zeros(n_heads, n_bins, dtype=torch.float64).index_add_(1, bin_, counted.sum(0).double())
    total = torch.zeros_like(count).index_add_(1, bin_, value.nan_to_num(0.0).sum(0))
    place = torch.zeros(n_bins, dtype=torch.float64).index_add_(0, bin_, torch.arange(n).double()) / bin_.bincount()
    head = torch.arange(n_heads).repeat_interleave(n_bins)
    frame = {"head": head, column: place.repeat(n_heads), "value": (total / count).flatten()}
    return pd.DataFrame(frame | {"n": count.long().flatten()})


def stream(
    model: nn.Module,
    tokens: TokenIds,
    templates: Mapping[str, StreamTemplate] | None = None,
    *,
    layers: Sequence[int] | None = None,
    lengths: Integers | None = None,
    histogram: bool = False,
    jensen_shannon: bool = False,
) -> ModelStream:
    """Run a model on long sequences, one at a time, and take the statistics of every layer's attention on the way.

    >>> stream(decoder, tokens, {"alibi": StreamTemplate.alibi(alibi_slopes(8))}).rows()

    Args:
        model: any model with attention; a ``TransformerBridge`` as far as it can run.
        tokens: ids, right-padded where sequences differ in length.
        templates, histogram, jensen_shannon: as in ``stream_attention``.
        layers: all by default.
        lengths: the number of tokens of each sequence that count; all of them by default.

    Raises:
        ProbeError: as ``attention_inputs`` and ``stream_attention``, or for lengths that do not fit the tokens.
    """
    sequences = Sequences.of(tokens, lengths)
    ids, n = sequences.tokens, sequences.tokens.shape[1]
    results: dict[int, list[StreamedAttention]] = {}
    windows: dict[int, int | None] = {}

    def visit(layer: int, inputs: AttentionInputs) -> None:
        windows[layer] = inputs.window or windows.get(layer)  # sequences shorter than the window do not show it
        streamed = stream_attention(
            inputs.q[0],
            inputs.k[0],
            scale=inputs.scale,
            bias=inputs.bias,
            window=inputs.window,
            templates=templates,
            histogram=histogram,
            jensen_shannon=jensen_shannon,
        )
        results.setdefault(layer, []).append(streamed)

    for sequence, length in zip(ids, sequences.lengths.tolist(), strict=True):
        attention_inputs(model, sequence[None, :length], visit, layers)
    return ModelStream({layer: _stack(parts, n) for layer, parts in results.items()}, windows)


def _stack(parts: list[Any], n: int) -> Any:
    """Results of several sequences as one, with a batch axis in front of every tensor."""
    kind = type(parts[0])
    stacked: dict[str, Any] = {}
    for of in fields(kind):
        values = [getattr(part, of.name) for part in parts]
        if isinstance(values[0], dict):
            stacked[of.name] = {name: _stack([value[name] for value in values], n) for name in values[0]}
        elif values[0] is None:
            stacked[of.name] = None
        else:
            beyond = 0.0 if of.name == "histogram" else torch.nan
            stacked[of.name] = torch.stack([F.pad(value, (0, n - value.shape[-1]), value=beyond) for value in values])
    return kind(**stacked)
