"""The seam through which the attention of any transformers model is seen and edited.

transformers' models don't compute attention themselves: each calls the function that its config names, from a registry.
One function is registered here. It gets queries and keys after rotation, norms and temperature, makes scores, pattern
and z as eager attention does, and hands each to the hooks of the forward pass that is going on.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probe.errors import ProbeError
from probe.models.layers import Hooks
from probe.models.mode import lock_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The names in the registry: attention by scores and pattern, and by one kernel that holds neither. The kernel is given
# masks of booleans, or none for a causal one; a model that works on its masks needs those of eager attention.
EXPLICIT, FUSED, FUSED_BY_MASKS = "position_probe", "position_probe_fused", "position_probe_fused_by_masks"


@dataclass(frozen=True)
class Call:
    """What an attention module handed to the attention function."""

    module: nn.Module
    query: Tensor  #: "batch head query d_head", as it enters the scores
    key: Tensor  #: "batch kv_head key d_head"
    scale: float
    mask: Tensor | None  #: True where a key is hidden; None for the plain causal mask
    added: bool  #: whether something else than the mask is added to the scores
    window: int | None  #: as the module says it
    sink: bool  #: whether a learned sink takes a share of each row
    softcap: float | None


@dataclass
class Pass:
    """One forward pass that is watched."""

    hooks: Hooks
    on_call: Callable[[int, Call], object] | None = None  #: called with the layer and what attention got
    layer: int = -1  #: the block that runs now
    done: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  #: by layer, the first call's keys and pattern

    def at(self, site: str, value: Tensor) -> Tensor:
        """The value at a site of this layer's attention, or what its hook puts in its place."""
        return self.hooks(f"blocks.{self.layer}.attn.{site}", value)

    def has(self, site: str) -> bool:
        """Whether a hook waits at a site of this layer's attention."""
        return self.hooks.has(f"blocks.{self.layer}.attn.{site}")


_NOBODY = Pass(Hooks({}))
_current: ContextVar[Pass | None] = ContextVar("pass", default=None)


@contextlib.contextmanager
def watched(model: "PreTrainedModel", going: Pass, implementation: str = EXPLICIT) -> Iterator[None]:
    """The model's attention runs through the seam inside, for this pass. A model has one pass at a time: its config
    names one attention function for all threads."""
    _register()
    with lock_of(model):
        before = _switch(model, implementation)
        try:
            with going_on(going):
                yield
        finally:
            for config, value in before:
                config._attn_implementation_internal = value


def is_going(going: Pass) -> bool:
    """Whether this thread runs that pass. Hooks on modules are there for other threads too."""
    return _current.get() is going


def _switch(model: "PreTrainedModel", implementation: str) -> list[tuple[Any, Any]]:
    """Let every config in the model name this attention function; the configs and what they named before."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        waiting = [config] if hasattr(config, "_attn_implementation_internal") else []
        while waiting:
            config = waiting.pop()
            if id(config) not in configs:
                configs[id(config)] = config
                parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
                waiting += [part for part in parts if hasattr(part, "_attn_implementation_internal")]
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    for config in configs.values():
        config._attn_implementation_internal = implementation
    return before


def current() -> Pass:
    """The pass that is going on; one without hooks where none is."""
    return _current.get() or _NOBODY


@contextlib.contextmanager
def going_on(going: Pass) -> Iterator[None]:
    """``attend`` calls the hooks of this pass inside."""
    token = _current.set(going)
    try:
        yield
    finally:
        _current.reset(token)


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    AttentionInterface.register(EXPLICIT, functools.partial(attend, fused=False))
    AttentionInterface.register(FUSED, functools.partial(attend, fused=True))
    AttentionInterface.register(FUSED_BY_MASKS, functools.partial(attend, fused=True))
    AttentionMaskInterface.register(EXPLICIT, eager_mask)
    AttentionMaskInterface.register(FUSED, sdpa_mask)
    AttentionMaskInterface.register(FUSED_BY_MASKS, eager_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    *,
    fused: bool,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """z, "batch pos head d_head", and the pattern; the hooks of the pass that is going on see and edit what is made.

    The arguments are those that transformers hands to an attention function.
    """
    going = current()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    hidden, added = _mask(attention_mask, key.shape[-2])
    if going.on_call is not None:
        window = others.get("sliding_window", getattr(module, "sliding_window", None))
        on_top = added is not None or position_bias is not None
        going.on_call(
            going.layer,
            Call(module, query, key, scale, hidden, on_top, window, s_aux is not None, softcap),
        )
    again = going.done.get(going.layer)
    if again is None:
        query, key = _turned(going, "hook_rot_q", query), _turned(going, "hook_rot_k", key)
        value = _turned(going, "hook_v", value)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = hidden is None and query.shape[-2] > 1 and bool(is_causal)
    if fused and added is None and softcap is None and s_aux is None and position_bias is None:
        visible = None if hidden is None else ~hidden
        z = F.scaled_dot_product_attention(
            query, _repeated(key, query), _repeated(value, query), attn_mask=visible, is_causal=causal, scale=scale,
            dropout_p=dropout if module.training else 0.0,
        )  # fmt: skip
        return going.at("hook_z", z.transpose(1, 2)).contiguous(), None

    if again is not None and again[0].shape == key.shape and torch.equal(again[0], key):
        pattern = again[1]  # a second product with the same pattern: the differential transformer's
    else:
        scores = query @ _repeated(key, query).transpose(2, 3) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        for bias in (position_bias, added):
            scores = scores if bias is None else scores + bias
        if causal:
            n, total = scores.shape[-2:]
            hidden = torch.ones(n, total, dtype=torch.bool, device=scores.device).triu(total - n + 1)
        scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
        if going.hooks.hooks and scores.shape[-2] != scores.shape[-1]:
            raise ProbeError(
                f"attention must go from tokens to tokens, but layer {going.layer} has {scores.shape[-1]} keys for "
                f"{scores.shape[-2]} tokens"
            )
        scores = going.at("hook_attn_scores", scores)
        pattern = _softmax(scores, s_aux).to(query.dtype)
        pattern = going.at("hook_pattern", F.dropout(pattern, dropout, module.training))
        going.done[going.layer] = (key, pattern)
        if going is _NOBODY:
            going.done.clear()
    z = (pattern @ _repeated(value, pattern)).transpose(1, 2)
    return (z if again is not None else going.at("hook_z", z)).contiguous(), pattern


def _mask(mask: Tensor | None, n_key: int) -> tuple[Tensor | None, Tensor | None]:
    """Which keys a mask hides (True), and what it adds to the scores of the others, if anything."""
    if mask is None:
        return None, None
    mask = mask[..., :n_key]
    if mask.dtype == torch.bool:
        return ~mask, None
    hidden = mask < torch.finfo(mask.dtype).min / 2
    added = mask.masked_fill(hidden, 0.0)
    return hidden, added if bool(added.any()) else None


def _softmax(scores: Tensor, sink: Tensor | None) -> Tensor:
    """The softmax in float32 or better; a sink is one more key, whose share is dropped."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    if sink is None:
        return scores.softmax(-1, dtype=wide)
    column = sink.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, column.to(scores)), -1).softmax(-1, dtype=wide)[..., :-1]


def _turned(going: Pass, site: str, value: Tensor) -> Tensor:
    """What a hook makes of "batch head pos d_head"; sites have "batch pos head d_head", as TransformerLens's."""
    return going.at(site, value.transpose(1, 2)).transpose(1, 2) if going.has(site) else value


def _repeated(x: Tensor, like: Tensor) -> Tensor:
    """Keys or values of a group of heads, once for each of its heads."""
    return x.repeat_interleave(like.shape[1] // x.shape[1], 1) if x.shape[1] != like.shape[1] else x
