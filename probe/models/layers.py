"""The layers of a decoder: attention with a cache and two paths, MLP, and the block of both."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from probe.models.config import ACTIVATIONS, DecoderConfig
from probe.models.encodings import Rotation, rotate
from probe.models.encodings.base import future_keys

Hook = Callable[[Tensor], Tensor | None]

# From queries at the last of the keys and those keys, "batch head pos d_head", to what is added to their scores.
ContentBias = Callable[[Tensor, Tensor], Float[Tensor, "batch head query key"]]


class KVCache:
    """The keys (turned, as they enter the scores) and values of the positions seen so far, one pair a layer."""

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values, "batch kv_head pos d_head", and return all of them."""
        if layer in self._layers:
            past_key, past_value = self._layers[layer]
            key, value = torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2)
        self._layers[layer] = (key, value)
        return key, value

    def first(self, n: int) -> "KVCache":
        """A cache of the first n positions; it shares their memory and can be extended on its own."""
        shorter = KVCache()
        shorter.length = n
        shorter._layers = {layer: (key[:, :, :n], value[:, :, :n]) for layer, (key, value) in self._layers.items()}
        return shorter

    def keep(self, rows: Tensor) -> None:
        """Keep only those sequences of the batch (a mask or indices)."""
        self._layers = {layer: (key[rows], value[rows]) for layer, (key, value) in self._layers.items()}


class Hooks:
    """Calls the hook of a site, if there is one, and takes what it returns in place of the value."""

    def __init__(self, hooks: Mapping[str, Hook], prefix: str = ""):
        self.hooks, self.prefix = hooks, prefix

    def under(self, prefix: str) -> "Hooks":
        return Hooks(self.hooks, self.prefix + prefix)

    def has(self, site: str) -> bool:
        return self.prefix + site in self.hooks

    def __call__(self, site: str, value: Tensor) -> Tensor:
        hook = self.hooks.get(self.prefix + site)
        if hook is None:
            return value
        edited = hook(value)
        return value if edited is None else edited


_NO_HOOKS = Hooks({})


@dataclass(frozen=True)
class BlockwiseMask:
    """The mask of many queries, made for one block of them at a time: it is never held whole."""

    make: Callable[[int, int], Float[Tensor, "1 #head query key"]]  # of queries start…end-1, for the keys they see
    n_block: int  # queries in a block


class Attention(nn.Module):
    """Causal self-attention, softmax(score_scale · q kᵀ + bias) v, with grouped key-value heads.

    What stands in the place of the softmax, and what queries are multiplied with, is the config's attention function.

    The names and the signature are those of Hugging Face's Llama attention: TransformerLens rebuilds attention from
    ``head_dim``, ``num_key_value_groups``, ``scaling`` and the four projections.
    """

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.d_head
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        self.scaling = config.score_scale
        self.attention_dropout = config.dropout
        self.function = config.make_attention_function()
        bias = config.has_bias("qkv")
        self.q_proj = nn.Linear(config.d_model, config.n_heads * config.d_head, bias=bias)
        self.k_proj = nn.Linear(config.d_model, config.n_kv_heads * config.d_head, bias=bias)
        self.v_proj = nn.Linear(config.d_model, config.n_kv_heads * config.d_head, bias=bias)
        self.o_proj = nn.Linear(config.n_heads * config.d_head, config.d_model, bias=config.has_bias("attn_out"))

    def forward(
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        attention_mask: Float[Tensor, "#batch #head pos key"] | BlockwiseMask | None = None,
        position_embeddings: Rotation | None = None,
        decay: Float[Tensor, "pos d_head"] | None = None,
        content_bias: ContentBias | None = None,
        cache: KVCache | None = None,
        fused: bool = False,
        hooks: Hooks = _NO_HOOKS,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch head pos key"] | None]:
        """The attention output and, unless ``fused``, the pattern.

        ``attention_mask`` is added to the scores (-inf hides a key); None means the plain causal mask, and blockwise
        ones are for the fused path, which only softmax has. Turned queries are multiplied and turned keys divided by
        ``decay``.
        """

        def heads(site: str, projection: nn.Linear, n: int) -> Tensor:
            x = projection(hidden_states).unflatten(-1, (n, self.head_dim))
            return hooks(site, x).transpose(1, 2)

        q = heads("hook_q", self.q_proj, self.n_heads)
        k = heads("hook_k", self.k_proj, self.n_kv_heads)
        v = heads("hook_v", self.v_proj, self.n_kv_heads)
        if position_embeddings is not None:
            q, k = rotate(q, position_embeddings), rotate(k, position_embeddings)
        if decay is not None:
            q, k = q * decay, k / decay
        scale = self.function.query_scale(hidden_states, 0 if cache is None else cache.length)
        if scale is not None:
            q = q * scale.transpose(1, 2)[..., None]
        # As at every other site, heads stand after positions there: transposing is free.
        q = hooks("hook_rot_q", q.transpose(1, 2)).transpose(1, 2)
        k = hooks("hook_rot_k", k.transpose(1, 2)).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        if self.num_key_value_groups > 1:
            k = k.repeat_interleave(self.num_key_value_groups, dim=1)
            v = v.repeat_interleave(self.num_key_value_groups, dim=1)
        z, pattern = (self._fused if fused else self._explicit)(q, k, v, attention_mask, content_bias, hooks)
        z = hooks("hook_z", z.transpose(1, 2))
        return self.o_proj(z.flatten(-2)), pattern

    def _fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | BlockwiseMask | None,
        content_bias: ContentBias | None,
        hooks: Hooks,
    ) -> tuple[Tensor, None]:
        if isinstance(mask, BlockwiseMask):
            n, past, blocks = q.shape[2], k.shape[2] - q.shape[2], []
            # The widest block goes first, so that all later ones find room in the memory that it leaves.
            for start in reversed(range(0, n, mask.n_block)):
                end = min(start + mask.n_block, n)
                seen = slice(0, past + end)
                part = q[:, :, start:end], k[:, :, seen], v[:, :, seen], mask.make(start, end)
                z, _ = self._fused(*part, content_bias, hooks)
                blocks.append(z)
            return torch.cat(blocks[::-1], dim=2), None
        if content_bias is not None:
            bias = content_bias(q, k)
            mask = bias if mask is None else bias + mask
        dropout = self.attention_dropout if self.training else 0.0
        # Without a mask there are as many queries as keys, or one query that sees every key.
        causal = mask is None and q.shape[2] > 1
        z = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=self.scaling
        )
        return z, None

    def _explicit(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | BlockwiseMask | None,
        content_bias: ContentBias | None,
        hooks: Hooks,
    ) -> tuple[Tensor, Tensor]:
        assert not isinstance(mask, BlockwiseMask)  # those are made for the fused path alone
        scores = (q * self.scaling) @ k.transpose(-1, -2)
        if content_bias is not None:
            scores = scores + content_bias(q, k)
        if mask is not None:
            scores = scores + mask
        elif q.shape[2] > 1:
            scores = scores.masked_fill(future_keys(q.shape[2], k.shape[2], q.device), -math.inf)
        scores = hooks("hook_attn_scores", scores)
        pattern = hooks("hook_pattern", self.function.normalise(scores))
        dropped = F.dropout(pattern, self.attention_dropout, self.training)
        return dropped @ v, pattern


class MLP(nn.Module):
    """W_out act(W_in x), or W_out (silu(W_gate x) * W_in x) for swiglu."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        bias = config.has_bias("mlp")
        if config.activation == "swiglu":
            self.gate_proj = nn.Linear(config.d_model, config.d_mlp, bias=bias)
        self.up_proj = nn.Linear(config.d_model, config.d_mlp, bias=bias)
        self.down_proj = nn.Linear(config.d_mlp, config.d_model, bias=bias)

    def forward(self, x: Float[Tensor, "batch pos d_model"], hooks: Hooks = _NO_HOOKS) -> Tensor:
        # As in TransformerLens, hook_pre is what enters the activation and hook_post what down_proj reads.
        gated = hasattr(self, "gate_proj")
        pre = hooks("hook_pre", (self.gate_proj if gated else self.up_proj)(x))
        post = self.activation(pre)
        if gated:
            post = post * self.up_proj(x)
        return self.down_proj(hooks("hook_post", post))


class Block(nn.Module):
    """One layer: attention, then MLP, or both at once, each reading the normalised stream and writing into it."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.attention_norm, self.attention = config.make_norm(), Attention(config, layer)
        self.mlp_norm, self.mlp = config.make_norm(), MLP(config)
        self.parallel = config.parallel
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        attention_mask: Tensor | BlockwiseMask | None = None,
        position_embeddings: Rotation | None = None,
        hooks: Hooks | None = None,
        **attention: Any,
    ) -> Float[Tensor, "batch pos d_model"]:
        # The sub-modules are handed hooks only where someone looks: TransformerLens wraps them with its own.
        at = hooks or _NO_HOOKS
        mlp = {} if hooks is None else {"hooks": hooks.under("mlp.")}
        if hooks is not None:
            attention["hooks"] = hooks.under("attn.")
        x = at("hook_resid_pre", x)
        out, _ = self.attention(
            hidden_states=self.attention_norm(x),
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **attention,
        )
        attended = x + self.dropout(at("hook_attn_out", out))
        if self.parallel:
            out = self.mlp(self.mlp_norm(x), **mlp)
            return at("hook_resid_post", attended + self.dropout(at("hook_mlp_out", out)))
        x = at("hook_resid_mid", attended)
        out = self.mlp(self.mlp_norm(x), **mlp)
        return at("hook_resid_post", x + self.dropout(at("hook_mlp_out", out)))
