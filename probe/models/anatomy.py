"""What can be asked of any model, ours or a bridge: its size, its sites, which of its layers see position."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from probe.errors import ProbeError
from probe.models.clockwork import ClockworkRNN
from probe.models.config import sites_of_layers
from probe.models.decoder import Decoder
from probe.models.kinds import Model
from probe.models.mode import evaluating

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# TransformerLens's names of the encodings that a bridge may have; of others it says nothing.
_BRIDGE_ENCODINGS = {"standard": "learned", "rotary": "rotary", "alibi": "alibi", "relative_positional_bias": "t5"}

# Two tokens, repeated so often, tell whether a layer sees position; its scores then differ by more than this, relative
# to the largest. (Where it does not, they differ by rounding, which in half precision is much.)
_REPEATS = 24
_DIFFERENT = {torch.float64: 1e-6, torch.float32: 1e-3}
_DIFFERENT_IN_HALF = 5e-2

_sites_of_bridges: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


def n_layers_of(model: nn.Module) -> int:
    """The number of layers."""
    return model.config.n_layers if isinstance(model, Model) else bridge_config(model).n_layers


def n_heads_of(model: nn.Module) -> int:
    """The number of heads of a layer.

    Raises:
        ProbeError: for a model without attention.
    """
    if isinstance(model, ClockworkRNN):
        raise ProbeError("a model with attention was wanted, got a ClockworkRNN, which has no heads")
    return model.config.n_heads if isinstance(model, Decoder) else bridge_config(model).n_heads


def d_model_of(model: nn.Module) -> int:
    """The width of the residual stream."""
    return model.config.d_model if isinstance(model, Model) else bridge_config(model).d_model


def d_vocab_of(model: nn.Module) -> int:
    """The number of token ids that it takes."""
    return model.config.d_vocab if isinstance(model, Model) else bridge_config(model).d_vocab


def bridge_config(model: nn.Module) -> Any:
    """The config of a bridge.

    Raises:
        ProbeError: for what is no model that can be looked at.
    """
    if not hasattr(model, "run_with_cache"):
        raise ProbeError(f"model must be a Decoder, a ClockworkRNN or a TransformerBridge, got {type(model).__name__}")
    return model.cfg


def our_decoder(model: nn.Module) -> Decoder | None:
    """The decoder of ours that a model is, or is a bridge of."""
    inner = getattr(model, "original_model", model)
    return inner if isinstance(inner, Decoder) else None


def sites_of(model: nn.Module) -> list[str]:
    """The full names of all sites, in the order in which they are computed.

    Of a bridge those that a token comes by: the bridges of some models have hooks that nothing ever calls.
    """
    if isinstance(model, Model):
        return model.config.sites()
    config = bridge_config(model)
    if model not in _sites_of_bridges:
        hooks, seen = set(cast("TransformerBridge", model).hook_dict), set()
        known = [site for site in sites_of_layers(config.n_layers, parallel=False) if site in hooks]
        _run_bridge(model, torch.zeros(1, 1, dtype=torch.long), known, lambda site, _: seen.add(site))
        _sites_of_bridges[model] = [site for site in known if site in seen]
    return _sites_of_bridges[model]


def layer_encodings(model: nn.Module) -> list[str]:
    """The name of the position encoding that each layer sees, "none" where it sees none, "unknown" without a name.

    A decoder's config says so. Of a bridge it is measured: of a token repeated without end every layer that sees no
    position has the same score for every key, to rounding, since all its queries are the same and all its keys are. A
    causal model with relative positions has constant hidden states there, so that what differs is made in that layer.
    """
    if isinstance(model, ClockworkRNN):
        return ["recurrence"] * model.config.n_layers
    decoder = our_decoder(model)
    if decoder is not None:
        config = decoder.config
        return [config.encoding if config.sees_position(layer) else "none" for layer in range(config.n_layers)]
    config = bridge_config(model)
    name = _BRIDGE_ENCODINGS.get(config.positional_embedding_type, "unknown")
    spread = [0.0] * config.n_layers

    def widest(site: str, scores: Tensor) -> None:
        layer, last = int(site.split(".")[1]), scores[:, :, -1].float()
        seen = last > torch.finfo(scores.dtype).min / 2  # a hidden key has the lowest number, or -inf
        size = last.where(seen, 0.0).abs().amax()
        differ = last.where(seen, -math.inf).amax(-1) - last.where(seen, math.inf).amin(-1)
        spread[layer] = float((differ.amax() / size.clamp(min=1e-30)).nan_to_num())

    tokens = torch.arange(min(2, config.d_vocab))[:, None].repeat(1, min(_REPEATS, config.n_ctx or _REPEATS))
    _run_bridge(model, tokens, [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(config.n_layers)], widest)
    least = _DIFFERENT.get(next(model.parameters()).dtype, _DIFFERENT_IN_HALF)
    return [name if wide > least else "none" for wide in spread]


@torch.no_grad()
def _run_bridge(model: Any, tokens: Tensor, sites: list[str], fn: Callable[[str, Tensor], object]) -> None:
    def at(site: str) -> Callable[..., None]:
        def hook(value: Tensor, hook: Any) -> None:
            fn(site, value)

        return hook

    with evaluating(model):
        model.run_with_hooks(tokens.to(next(model.parameters()).device), fwd_hooks=[(site, at(site)) for site in sites])
