"""A TransformerBridge, of a decoder of ours or of any other model, as a model that can be looked at."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probe.errors import ProbeError
from probe.models.config import sites_of_layers
from probe.models.decoder import Decoder
from probe.models.hidden_keys import hide_keys, window_of
from probe.models.lens.check import check_once
from probe.models.mode import evaluating
from probe.models.protocol import ATTENTION, Anatomy, AttentionInputs, Hook, Layer, Visit
from probe.models.streamed import layer_inputs
from probe.models.trial import least_difference

# TransformerLens's names of the encodings that a bridge may have; of others it says nothing.
_ENCODINGS = {"standard": "learned", "rotary": "rotary", "alibi": "alibi", "relative_positional_bias": "t5"}

_REPEATS = 24  # of two tokens: they tell whether a layer sees position

_SCORES = "attn.hook_attn_scores"

# A bridge's own pattern is compared in so many rows with what its queries and keys make.
_WITNESSES = 64


class BridgeModel:
    """The view of a bridge; hooks go through the bridge's own."""

    def __init__(self, bridge: nn.Module) -> None:
        self.bridge: Any = bridge

    @property
    def owner(self) -> nn.Module:
        """The model under the bridge."""
        inner: nn.Module = getattr(self.bridge, "original_model", self.bridge)
        return inner

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.bridge.parameters()).device

    @property
    def _decoder(self) -> Decoder | None:
        return self.owner if isinstance(self.owner, Decoder) else None

    @cached_property
    def anatomy(self) -> Anatomy:
        """Its layers, sizes and sites. A decoder's config says what its layers are; of others it is measured.

        Sites are those that a token comes by: the bridges of some models have hooks that nothing ever calls.
        """
        config, decoder = self.bridge.cfg, self._decoder
        known = [s for s in sites_of_layers(config.n_layers, parallel=False) if s in self.bridge.hook_dict]
        seen = set()

        def keep(site: str) -> Hook:
            return lambda _: seen.add(site)

        self._run(torch.zeros(1, 1, dtype=torch.long), {site: keep(site) for site in known})
        sites = tuple(site for site in known if site in seen)
        if decoder is not None:
            layers = decoder.anatomy.layers
        else:
            layers = tuple(Layer(ATTENTION, name, config.n_heads) for name in self._encodings())
        return Anatomy(layers, config.d_model, config.d_vocab, config.n_ctx, sites)

    def _encodings(self) -> list[str]:
        """The encoding of each layer, "none" where it sees none, "unknown" without a name.

        Of a token repeated without end every layer that sees no position has the same score for every key, to rounding,
        since all its queries are the same and all its keys are. A causal model with relative positions has constant
        hidden states there, so that what differs is made in that layer.
        """
        config = self.bridge.cfg
        name = _ENCODINGS.get(config.positional_embedding_type, "unknown")
        spread = [0.0] * config.n_layers

        def widest(layer: int) -> Hook:
            def hook(scores: Tensor) -> None:
                last = scores[:, :, -1].float()
                seen = last > torch.finfo(scores.dtype).min / 2  # a hidden key has the lowest number, or -inf
                size = last.where(seen, 0.0).abs().amax()
                differ = last.where(seen, -math.inf).amax(-1) - last.where(seen, math.inf).amin(-1)
                spread[layer] = float((differ.amax() / size.clamp(min=1e-30)).nan_to_num())

            return hook

        tokens = torch.arange(min(2, config.d_vocab))[:, None].repeat(1, min(_REPEATS, config.n_ctx or _REPEATS))
        self._run(tokens, {f"blocks.{layer}.{_SCORES}": widest(layer) for layer in range(config.n_layers)})
        least = least_difference(next(self.bridge.parameters()).dtype)
        return [name if wide > least else "none" for wide in spread]

    def run(
        self, tokens: Int[Tensor, "batch pos"], hooks: Mapping[str, Hook], *, explicit: bool = False
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """See ``probe.models.protocol.Model.run``. A bridge always makes scores and patterns."""
        check_once(self.bridge)
        return self._run(tokens, hooks)

    @torch.no_grad()
    def _run(self, tokens: Tensor, hooks: Mapping[str, Hook]) -> Tensor:
        def at(site: str) -> Callable[..., Tensor | None]:
            def hook(value: Tensor, hook: Any) -> Tensor | None:
                return hooks[site](hide_keys(value) if site.endswith(_SCORES) else value)

            return hook

        with evaluating(self.bridge):
            logits: Tensor = self.bridge.run_with_hooks(
                tokens.to(self.device), fwd_hooks=[(site, at(site)) for site in hooks]
            )
        return logits

    def attention_inputs(self, tokens: Int[Tensor, "batch pos"], visit: Visit, layers: Sequence[int]) -> None:
        """See ``probe.models.protocol.Model.attention_inputs``. A bridge holds every pattern, so it goes only as far as
        it can run; that the inputs make the bridge's own pattern is checked in some rows of it."""
        bridge, decoder = self.bridge, self._decoder
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
                    inputs = layer_inputs(decoder.config, decoder.encoding, layer, q, k)
                else:
                    scale = getattr(bridge.blocks[layer].attn.original_component, "scaling", None)
                    window = None if scores is None else window_of(hide_keys(scores) != -math.inf, layer)
                    scale = float(scale or q.shape[-1] ** -0.5)
                    inputs = AttentionInputs(q.transpose(1, 2), k.transpose(1, 2), scale, window=window)
                _check_pattern(layer, inputs, pattern)
                visited.add(layer)
                visit(layer, inputs)

            return hook

        hooks: list[tuple[str, Callable[..., None]]] = []
        for layer in layers:
            turned = f"blocks.{layer}.attn.hook_rot_q" in bridge.hook_dict
            sites = {name: f"attn.hook_rot_{name}" if turned else f"attn.hook_{name}" for name in ("q", "k")}
            if f"blocks.{layer}.{_SCORES}" in bridge.hook_dict:
                sites["scores"] = _SCORES
            hooks += [(f"blocks.{layer}.{site}", keep(name)) for name, site in sites.items()]
            hooks.append((f"blocks.{layer}.attn.hook_pattern", hook_pattern(layer)))
        missing = [name for name, _ in hooks if name not in bridge.hook_dict]
        if missing:
            raise ProbeError(f"this bridge shows no queries, keys and patterns to stream: it has no {missing[0]}")
        check_once(bridge)
        bridge.run_with_hooks(tokens.to(self.device), fwd_hooks=hooks)
        for layer in layers:
            if layer not in visited:
                raise ProbeError(
                    f"this bridge has sites for the queries and keys of layer {layer}, but never calls them"
                )

    def new_cache(self) -> None:
        """None: a bridge's cache can't be had."""

    def untrained(self, seed: int) -> nn.Module:
        """A bridge of the same architecture with fresh weights."""
        from probe.models.lens import to_bridge, untrained_bridge

        decoder = self._decoder
        return untrained_bridge(self.bridge, seed) if decoder is None else to_bridge(decoder.untrained(seed))


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
