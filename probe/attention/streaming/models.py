"""Streaming statistics of a model's own attention: its queries and keys as they are computed, one layer at a time."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
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
from probe.models.anatomy import d_vocab_of, n_layers_of, our_decoder
from probe.models.decoder import Decoder
from probe.models.encodings import RelativeBias
from probe.models.lens.check import check_once
from probe.models.mode import evaluating
from probe.sequences import Integers, Sequences, TokenIds, check_ids, token_ids
from probe.shown import Shown
from probe.tracing import PATTERN, SCORES, block_site, hide_keys, mask_of_scores

ROT_Q, ROT_K = "attn.hook_rot_q", "attn.hook_rot_k"

# A bridge's own pattern is compared in so many rows with what its queries and keys make.
_WITNESSES = 64


@dataclass(frozen=True)
class AttentionInputs:
    """All that a layer's pattern follows from: softmax(scale q_t·k_i + bias[t - i]), t - window < i ≤ t."""

    q: Float[Tensor, "batch head query d_head"]  #: as they enter the scores, after any rotation
    k: Float[Tensor, "batch kv_head query d_head"]  #: likewise
    scale: float  #: what q·k is multiplied with
    bias: Float[Tensor, "head query"] | None = None  #: by distance, in nats
    window: int | None = None  #: how many keys a query sees at most; all up to its own where None


Visit = Callable[[int, AttentionInputs], None]


@torch.no_grad()
def attention_inputs(model: nn.Module, tokens: TokenIds, visit: Visit, layers: Sequence[int] | None = None) -> None:
    """Run a model once and call ``visit(layer, inputs)`` at each layer's attention; nothing is kept.

    A decoder runs by fused attention and stops at the last layer that is asked for: memory grows with the length, not
    with its square. A bridge holds every pattern, so it goes only as far as it can run.

    Raises:
        ProbeError: for a layer that does not exist, a model that is neither a ``Decoder`` nor a ``TransformerBridge``,
            or one whose pattern does not follow from its queries and keys (a bias or a cap that the bridge does not
            show, as BLOOM's) or is no softmax (entmax).
    """
    if not isinstance(model, Decoder) and not hasattr(model, "run_with_hooks"):
        raise ProbeError(f"streaming wants a Decoder or a TransformerBridge, got {type(model).__name__}")
    n_layers, ids = n_layers_of(model), token_ids(tokens)
    check_ids(ids, d_vocab_of(model))
    layers = range(n_layers) if layers is None else sorted({*layers})
    if not layers or not all(0 <= layer < n_layers for layer in layers):
        raise ProbeError(f"layers must be some of 0…{n_layers - 1}, got {list(layers)}")
    decoder = our_decoder(model)
    if decoder is not None and not decoder.config.is_softmax:
        name = decoder.config.attention_function
        raise ProbeError(f"streaming wants patterns that are a softmax of the scores, got attention function {name!r}")
    with evaluating(model):
        if isinstance(model, Decoder):
            _from_decoder(model, ids, visit, layers)
        else:
            _from_bridge(model, ids, visit, layers)


class _Enough(Exception):
    """The last layer that was asked for has been seen; the logits of a long text alone may fill the memory."""


def _from_decoder(model: Decoder, tokens: Tensor, visit: Visit, layers: Sequence[int]) -> None:
    pending: list[Tensor] = []

    def hook_k(layer: int) -> Callable[[Tensor], None]:
        def hook(k: Tensor) -> None:
            visit(layer, _inputs(model, layer, pending.pop(), k))
            if layer == layers[-1]:
                raise _Enough

        return hook

    hooks = {block_site(layer, ROT_Q): pending.append for layer in layers}
    hooks |= {block_site(layer, ROT_K): hook_k(layer) for layer in layers}
    with contextlib.suppress(_Enough):
        model(tokens.to(model.device), hooks=hooks, attention="fused")


def _inputs(decoder: Decoder, layer: int, q: Tensor, k: Tensor) -> AttentionInputs:
    """Those of a decoder's layer, from the values at its sites, "batch pos head d_head"."""
    encoding, bias, distance = decoder.encoding, None, torch.arange(q.shape[1])
    if decoder.config.sees_position(layer):
        if encoding.reads_content:
            raise ProbeError(f"streaming wants scores of q·k and the distance alone, got {type(encoding).__name__}")
        if isinstance(encoding, RelativeBias):
            bias = encoding.by_distance(distance, q).detach()
        elif encoding.bias(distance[:1], distance[:1], q) is not None:
            raise ProbeError(
                f"streaming wants a bias that depends on the distance alone, got {type(encoding).__name__}"
            )
    return AttentionInputs(q.transpose(1, 2), k.transpose(1, 2), decoder.config.score_scale, bias)


def _from_bridge(model: Any, tokens: Tensor, visit: Visit, layers: Sequence[int]) -> None:
    decoder = our_decoder(model)
    seen: dict[str, Tensor] = {}
    visited = set()

    def keep(name: str) -> Callable[..., None]:
        def hook(value: Tensor, hook: Any) -> None:
            seen[name] = value

        return hook

    def hook_pattern(layer: int) -> Callable[..., None]:
        def hook(pattern: Tensor, hook: Any) -> None:
            if not {"q", "k"} <= seen.keys():
                return  # what that means is said below
            q, k, scores = seen.pop("q"), seen.pop("k"), seen.pop("scores", None)
            if decoder is not None:
                inputs = _inputs(decoder, layer, q, k)
            else:
                scale = getattr(model.blocks[layer].attn.original_component, "scaling", None) or q.shape[-1] ** -0.5
                window = None if scores is None else _window_of(scores, layer)
                inputs = AttentionInputs(q.transpose(1, 2), k.transpose(1, 2), float(scale), window=window)
            _check_pattern(layer, inputs, pattern)
            visited.add(layer)
            visit(layer, inputs)

        return hook

    hooks: list[tuple[str, Callable[..., None]]] = []
    for layer in layers:
        turned = block_site(layer, ROT_Q) in model.hook_dict
        sites = {"q": ROT_Q, "k": ROT_K} if turned else {"q": "attn.hook_q", "k": "attn.hook_k"}
        if block_site(layer, SCORES) in model.hook_dict:
            sites["scores"] = SCORES
        hooks += [(block_site(layer, site), keep(name)) for name, site in sites.items()]
        hooks.append((block_site(layer, PATTERN), hook_pattern(layer)))
    missing = [name for name, _ in hooks if name not in model.hook_dict]
    if missing:
        raise ProbeError(f"this bridge shows no queries, keys and patterns to stream: it has no {missing[0]}")
    check_once(model)
    model.run_with_hooks(tokens.to(next(model.parameters()).device), fwd_hooks=hooks)
    for layer in layers:
        if layer not in visited:
            raise ProbeError(f"this bridge has sites for the queries and keys of layer {layer}, but never calls them")


def _window_of(scores: Float[Tensor, "batch head query key"], layer: int) -> int | None:
    """How many keys each query sees at most; None where it sees all up to its own."""
    mask = mask_of_scores(hide_keys(scores))
    if mask is None:
        return None
    n_visible = mask[0, 0].sum(-1)
    window = int(n_visible.max())
    if mask.shape[:2] != (1, 1) or not torch.equal(n_visible, torch.arange(1, len(n_visible) + 1).clamp(max=window)):
        raise ProbeError(f"streaming needs a causal mask or a sliding window, but layer {layer} hides other keys")
    return window


def _check_pattern(layer: int, inputs: AttentionInputs, pattern: Float[Tensor, "batch head query key"]) -> None:
    """Refuse where some rows of the model's own pattern are not what the inputs make."""
    n = pattern.shape[-1]
    rows = torch.linspace(0, n - 1, min(n, _WITNESSES), device=pattern.device).long()
    k = inputs.k.repeat_interleave(inputs.q.shape[1] // inputs.k.shape[1], dim=1).float()
    scores = inputs.scale * inputs.q[:, :, rows].float() @ k.transpose(-1, -2)
    away = rows[:, None] - torch.arange(n, device=rows.device)
    if inputs.bias is not None:
        scores += inputs.bias[:, away.clamp(min=0)]
    hidden = (away < 0) | (away >= (inputs.window or n))
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    if not (expected - pattern[:, :, rows]).abs().max() <= torch.finfo(pattern.dtype).eps ** 0.5:
        raise ProbeError(
            f"the pattern of layer {layer} is not softmax(scale q·k): the model has a bias or a cap that this bridge "
            "does not show"
        )


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
        model: a ``Decoder``, or a ``TransformerBridge`` as far as it can run.
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
