"""The one door between models and measurements: run a model, keep what was asked for, under one set of names."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from probe.config import check_size
from probe.errors import ProbeError
from probe.models.anatomy import n_layers_of, sites_of
from probe.models.config import SITES
from probe.models.decoder import Decoder
from probe.models.hidden_keys import (
    hide_keys,
    hides_by_numbers,
    joined_masks,
    mask_of_scores,
    nearest_keys,
    window_mask,
)
from probe.models.mode import evaluating
from probe.models.open.recorded import ByLayer, Recorded, read_arrays, recorded
from probe.models.open.ways import as_model
from probe.sequences import Integers, Sequences, TokenIds, check_ids, first_like_each, token_ids
from probe.shown import Shown

EMBED = "hook_embed"
PATTERN = "attn.hook_pattern"
Z = "attn.hook_z"
SCORES = "attn.hook_attn_scores"
RESID_POST = "hook_resid_post"


def block_site(layer: int, site: str) -> str:
    """The full name of a site inside a layer: ``block_site(0, PATTERN) == "blocks.0.attn.hook_pattern"``."""
    return f"blocks.{layer}.{site}"


@dataclass(frozen=True)
class Trace(Shown):
    """What a model computed on some sequences. Values are on the CPU, sequences in the order of ``tokens``.

    ``lengths[b]`` is the number of tokens of sequence b that count; what stands to the right of them is padding, which
    a causal model's earlier rows never see. Measurements leave those rows out.
    """

    tokens: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, "batch"]
    values: dict[str, Tensor]  #: what was kept, by full site name; ``trace[site]`` asks for one
    n_layers: int  #: of the model
    #: by layer, which keys a query sees where that is not all keys up to its own: layers with a sliding window, say
    masks: dict[int, Bool[Tensor, "#batch #head query key"]] = field(default_factory=dict)
    #: layers with a learned sink, whose rows sum to 1 less its share
    sinks: Collection[int] = frozenset()

    def __post_init__(self) -> None:
        """Refuse what no measurement could read; ids and lengths of any kind become int64."""
        sequences = Sequences.of(self.tokens, self.lengths)
        object.__setattr__(self, "tokens", sequences.tokens)
        object.__setattr__(self, "lengths", sequences.lengths)
        object.__setattr__(self, "values", dict(self.values))
        object.__setattr__(self, "sinks", frozenset(self.sinks))
        for site, value in self.values.items():
            if not isinstance(value, Tensor) or value.shape[:1] != self.tokens.shape[:1]:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ProbeError(f"values at {site!r} must be a tensor of {len(self.tokens)} sequences, got {got}")
            if site.endswith(SCORES) and value.is_floating_point() and value.ndim == 4 and hides_by_numbers(value):
                self.values[site] = hide_keys(value)
        check_size("n_layers", self.n_layers)

    @classmethod
    def from_arrays(
        cls,
        tokens: TokenIds,
        *,
        patterns: ByLayer = None,
        scores: ByLayer = None,
        hidden: ByLayer = None,
        values: Mapping[str, Any] | None = None,
        lengths: Integers | None = None,
        sinks: Collection[int] = (),
        n_layers: int | None = None,
    ) -> "Trace":
        """The trace of arrays that any tool has recorded: numpy's, torch's, or lists.

        Every measurement of traces takes it. ``probe.wrap`` makes a model of it, for those that take a model; they say
        so where they need more than the arrays.

        Args:
            tokens: ids "batch pos".
            patterns, scores: attention after and before the softmax, floats "layer batch head query key", a list of one
                array for each layer, or arrays by number of the layer.
            hidden: hidden states after each layer, "layer batch pos d_model", or likewise.
            values: further arrays by full names of sites, such as "hook_embed" or "blocks.0.hook_resid_mid".
            lengths: the number of tokens of each sequence that count; all of them by default.
            sinks: numbers of the layers with a learned sink, whose rows sum to less than 1.
            n_layers: of the model; by default as many as the arrays have.

        Raises:
            ProbeError: where there is no array, or one of another shape than the tokens.

        Example:
            >>> trace = probe.Trace.from_arrays(tokens, patterns=attentions, hidden=hidden_states[1:])
            >>> probe.compare_templates(trace)
        """
        arrays = {"patterns": patterns, "scores": scores, "hidden": hidden, "values": values}
        return cls._of(recorded(tokens, arrays, lengths=lengths, sinks=sinks, n_layers=n_layers))

    @classmethod
    def from_file(cls, path: str | Path) -> "Trace":
        """The trace in a ``.npz`` or ``.safetensors`` file, whose arrays are named as the arguments of ``from_arrays``
        (``patterns.0`` for one layer) or as sites.

        Raises:
            ProbeError: for a file that is neither, or as ``from_arrays``.
        """
        return cls._of(read_arrays(path))

    @classmethod
    def _of(cls, model: Recorded) -> "Trace":
        values = {site: model.value(site) for site in model.sites}
        return cls(model.get_buffer("tokens"), model.get_buffer("lengths"), values, model.n_layers, sinks=model.sinks)

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.values:
            raise ProbeError(f"the trace holds no {site!r}; it was taken at: {', '.join(self.values) or 'no site'}")
        return self.values[site]

    def layers_at(self, site: str) -> list[int]:
        """The layers of which the trace holds a site (its name without the layer): of ``PATTERN`` those that have
        attention, where the trace was taken in every layer.

        Raises:
            ProbeError: where it holds that site of no layer.
        """
        layers = [layer for layer in range(self.n_layers) if block_site(layer, site) in self.values]
        if not layers:
            raise ProbeError(f"the trace holds no {site!r}; it was taken at: {', '.join(self.values) or 'no site'}")
        return layers

    def pattern(self, layer: int) -> Float[Tensor, "batch head query key"]:
        """The attention pattern of a layer, after the softmax: every row sums to 1, or in a layer with a learned sink
        to 1 less ``sink_mass``."""
        return self._cells(layer, PATTERN)

    def sink_mass(self, layer: int) -> Float64[Tensor, "batch head query"]:
        """The share of each row of attention that the layer's learned sink takes, in [0, 1]; 0 without a sink.

        gpt-oss and Granite 4 learn a number for each head that enters the softmax as the score of one more key, which
        has no value: what it takes is taken from the tokens.
        """
        if layer not in self.sinks:
            return torch.zeros(self.pattern(layer).shape[:3], dtype=torch.float64)
        return (1 - self.pattern(layer).sum(-1, dtype=torch.float64)).clamp(min=0, max=1)

    def scores(self, layer: int) -> Float[Tensor, "batch head query key"]:
        """The scores of a layer, before the softmax; -inf where the key is hidden from the query."""
        return self._cells(layer, SCORES)

    def _cells(self, layer: int, site: str) -> Float[Tensor, "batch head query key"]:
        value, n = self[block_site(layer, site)], self.tokens.shape[1]
        if value.ndim != 4 or value.shape[2:] != (n, n) or not value.is_floating_point():
            raise ProbeError(
                f"values at {block_site(layer, site)!r} must be floats (batch, head, query, key) for {n} queries and "
                f"keys, got {value.dtype} {tuple(value.shape)}"
            )
        return value

    def distinct(self) -> "Trace":
        """The trace of each distinct sequence once, as measurements count them (see ``probe.sequences``). Sequences of
        the same tokens whose values differ by more than rounding are distinct, too: no model made them from tokens."""
        first = first_like_each(self.tokens, self.lengths)
        again = [b for b, f in enumerate(first.tolist()) if f < b and self._alike(b, f)]
        if not again:
            return self
        kept = torch.ones(len(self.tokens), dtype=torch.bool)
        kept[again] = False
        masks = {layer: mask if len(mask) == 1 else mask[kept] for layer, mask in self.masks.items()}
        values = {site: value[kept] for site, value in self.values.items()}
        return Trace(self.tokens[kept], self.lengths[kept], values, self.n_layers, masks, self.sinks)

    def _alike(self, a: int, b: int) -> bool:
        """Whether the values of two sequences are the same but for rounding; padding does not count."""
        n = int(self.lengths[a])
        for site, value in self.values.items():
            rows = (slice(None), slice(n), slice(n)) if site.endswith((PATTERN, SCORES)) else (slice(n),)
            x, y = value[a][rows].double(), value[b][rows].double()
            rounding = torch.finfo(value.dtype).eps ** 0.5
            if not torch.allclose(x, y, rtol=rounding, atol=rounding, equal_nan=True):
                return False
        return True

    def visible(self, layer: int) -> Bool[Tensor, "#batch #head query key"]:
        """True where a query of a layer sees the key: all keys up to its own, unless the layer hides more of them (a
        sliding window). What the scores hide, if the trace holds them, counts."""
        if layer not in self.masks and block_site(layer, SCORES) in self.values:
            found = mask_of_scores(self.scores(layer))
            if found is not None:
                self.masks[layer] = found
        n = self.tokens.shape[1]
        return self.masks.get(layer, torch.ones(1, 1, n, n, dtype=torch.bool).tril())

    def n_visible(self, layer: int) -> Int[Tensor, "query"]:
        """How many keys each query of a layer sees: its own and those right before it, so that t + 1 is all of them.

        Raises:
            ProbeError: where a layer hides other keys than the furthest ones, or not the same ones in every sequence
                and head: no measurement of position here knows what to make of that.
        """
        visible = self.visible(layer)
        n_visible = visible[0, 0].sum(-1)
        if visible.shape[:2] != (1, 1) or not torch.equal(visible[0, 0], nearest_keys(n_visible)):
            raise ProbeError(
                f"layer {layer} must show each query its own key and the nearest before it, the same number in every "
                "sequence and head; its scores are -inf at other keys too"
            )
        return n_visible

    def hidden(self, site: str) -> Float[Tensor, "batch pos d_model"]:
        """Hidden states at a site, checked to be finite."""
        value = self[site]
        if value.ndim != 3:
            raise ProbeError(f"{site!r} holds no hidden states (batch, pos, d_model) but {tuple(value.shape)}")
        if not value.isfinite().all():
            raise ProbeError(f"hidden states at {site!r} must be finite, got NaN or infinity")
        return value


def distinct(trace: Any, name: str = "trace") -> Trace:
    """``Trace.distinct`` of what a measurement is given.

    Raises:
        ProbeError: for anything but a trace.
    """
    if not isinstance(trace, Trace):
        raise ProbeError(
            f"{name} must be what probe.trace returns, or a Trace made by hand, got {type(trace).__name__}"
        )
    return trace.distinct()


def expand_sites(sites: Sequence[str], model: nn.Module) -> list[str]:
    """Full site names; one without its layer (``"hook_resid_post"``) stands for that site in every layer that has it.

    Raises:
        ProbeError: for a site that the model has not.
    """
    known = sites_of(model)
    by_name: dict[str, list[str]] = {}
    for site in known:
        by_name.setdefault(site.split(".", 2)[2] if site.startswith("blocks.") else site, []).append(site)
    full: list[str] = []
    for site in sites:
        if site not in known and site not in by_name:
            in_layer = [name for name in by_name if name not in known]
            raise ProbeError(
                f"unknown site {site!r}; known: {', '.join(SITES)}, and in a layer (with or without "
                f"'blocks.<layer>.' before it, layers 0…{n_layers_of(model) - 1}): {', '.join(in_layer)}"
            )
        full += by_name.get(site, [site])
    return list(dict.fromkeys(full))


@torch.no_grad()
def trace(
    model: nn.Module,
    tokens: TokenIds,
    sites: Sequence[str] = (EMBED, RESID_POST, PATTERN),
    *,
    lengths: Integers | None = None,
    batch_size: int = 64,
) -> Trace:
    """Run a model on token ids and keep the values at ``sites``.

    Args:
        model: any model: a ``Decoder``, a ``ClockworkRNN``, a model of transformers, a TransformerLens
            ``TransformerBridge``, or what ``probe.wrap`` returns.
        tokens: ids "batch pos", right-padded where sequences differ in length: integers of any kind, or what has
            such ``tokens`` (see ``token_ids``).
        sites: TransformerLens names (``"blocks.0.hook_resid_post"``); without its layer, a site of every layer.
        lengths: the number of tokens of each sequence that count; all of them by default.
        batch_size: sequences in one forward pass.

    Raises:
        ProbeError: for an empty batch, ids that are no integers or that the model does not know, an unknown site, or
            lengths that do not fit the tokens.
    """
    sequences = Sequences.of(tokens, lengths)
    tokens, lengths = sequences.tokens, sequences.lengths
    kept: dict[str, list[Tensor]] = {}
    hidden: dict[int, list[Tensor | None]] = {}
    sites = expand_sites(sites, model)
    watched = [] if isinstance(as_model(model).owner, Decoder) else _scores_beside_patterns(sites, model)

    def keep(site: str, value: Tensor, rows: slice) -> None:
        if site in watched:
            hidden.setdefault(int(site.split(".")[1]), []).append(mask_of_scores(value))
        if site in sites:
            kept.setdefault(site, []).append(value.cpu())

    beside = [site for site in watched if site not in sites]
    n_layers = visit(model, tokens, [*sites, *beside], keep, batch_size=batch_size)
    # What came in one batch is kept as it is: patterns are large, and a copy takes as long as a layer.
    whole = {site: parts[0].contiguous() if len(parts) == 1 else torch.cat(parts) for site, parts in kept.items()}
    values = {site: whole[site] for site in sites}
    layers, n = as_model(model).anatomy.layers, tokens.shape[1]
    sinks = frozenset(i for i, layer in enumerate(layers) if layer.sink)
    masks = joined_masks(hidden, len(tokens), batch_size)
    if not watched:  # a decoder of ours, whose config says what its layers hide
        masks |= {i: window_mask(layer.window, n) for i, layer in enumerate(layers) if (layer.window or n) < n}
    return Trace(tokens, lengths, values, n_layers, masks, sinks)


def _scores_beside_patterns(sites: Sequence[str], model: nn.Module) -> list[str]:
    """The scores of the layers whose patterns are kept, where the model shows them: they tell which keys are hidden,
    which a weight of 0 does not (it may be rounding)."""
    known = sites_of(model)
    beside = [site.removesuffix(PATTERN) + SCORES for site in sites if site.endswith(PATTERN)]
    return [site for site in beside if site in known]


@torch.no_grad()
def visit(
    model: nn.Module,
    tokens: TokenIds,
    sites: Sequence[str],
    fn: Callable[[str, Tensor, slice], object],
    *,
    batch_size: int = 64,
) -> int:
    """Run a model on token ids and call ``fn(site, value, rows)`` with each value as it is computed; keep nothing.

    ``value`` is that of the sequences ``tokens[rows]``, on the model's device; it must not be changed, and what ``fn``
    returns is not read. Sites and errors are those of ``trace``.

    Returns:
        The number of layers of the model.
    """
    ids = token_ids(tokens)
    if batch_size < 1:
        raise ProbeError(f"batch_size must be at least 1, got {batch_size}")
    view = as_model(model)
    check_ids(ids, view.anatomy.d_vocab)
    full = expand_sites(sites, model)
    with evaluating(model):
        for start in range(0, len(ids), batch_size):
            rows = slice(start, min(start + batch_size, len(ids)))
            hooks = {site: _call(fn, site, rows) for site in full}
            view.run(ids[rows], hooks)
    return len(view.anatomy.layers)


@torch.no_grad()
def logits_with_edits(
    model: nn.Module, tokens: TokenIds, edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None
) -> Float[Tensor, "batch pos d_vocab"]:
    """The logits of any model that ``trace`` reads while the values at some sites are replaced.

    ``edits`` maps full site names to functions of the value there that return what takes its place. Logits are on the
    CPU, in float32 or better.

    Raises:
        ProbeError: for a site that the model has not, or ids that are no integers or that the model does not know.
    """
    edits, ids = edits or {}, token_ids(tokens)
    check_ids(ids, as_model(model).anatomy.d_vocab)
    sites = expand_sites([*edits], model)
    with evaluating(model):
        # The explicit path always: two runs differ by the edit and not by a kernel.
        logits = as_model(model).run(ids, {site: edits[site] for site in sites}, explicit=True)
    return logits.cpu().to(torch.promote_types(logits.dtype, torch.float32))


def _call(fn: Callable[[str, Tensor, slice], object], site: str, rows: slice) -> Callable[[Tensor], None]:
    def hook(value: Tensor) -> None:
        fn(site, value, rows)

    return hook
