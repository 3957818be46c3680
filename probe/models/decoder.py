"""The decoder that everything is measured on: a causal, pre-norm transformer in plain torch.

Its residual stream is ``x <- x + Attention(norm(x)); x <- x + MLP(norm(x))``, with a norm before the unembedding.
Intermediate values are reached by hooks under the names that TransformerLens uses (``SITES`` and ``BLOCK_SITES``); the
attention module keeps the calling convention of Hugging Face's Llama, so that ``probe.models.lens`` can wrap it.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from probe.config import check_flag, check_number, check_size, from_mapping
from probe.errors import ProbeError, unknown_name
from probe.models.encodings import Rotation, make_encoding, rotate

Hook = Callable[[Tensor], Tensor | None]

# What a hook can see. hook_embed is the token embedding alone, before any position is added. Shapes: residual stream
# "batch pos d_model"; q, k, v, z "batch pos head d_head" (k and v with n_kv_heads, q and k before any rotation); scores
# and pattern "batch head query key"; mlp "batch pos d_mlp". Scores are those that enter the softmax: scaled, with the
# encoding's bias, -inf where the key is in the future.
SITES = ("hook_embed",)
BLOCK_SITES = (
    "hook_resid_pre",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "swiglu": F.silu}
ATTENTION_PATHS = ("auto", "explicit", "fused")

# Up to this length a CPU is faster with two batched products and a softmax than with the fused kernel.
EXPLICIT_LENGTH_ON_CPU = 512


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that fixes a decoder's shape. Validated when made; JSON there and back.

    ``None`` stands for the usual choice: ``n_kv_heads`` = n_heads, ``d_head`` = d_model / n_heads, ``d_mlp`` =
    4 d_model, ``score_scale`` = d_head^-1/2 (T5 uses 1), ``position_layers`` = every layer.
    """

    d_vocab: int
    n_ctx: int
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int | None = None
    d_head: int | None = None
    d_mlp: int | None = None
    activation: str = "gelu"
    normalization: str = "layer"
    norm_eps: float = 1e-5
    bias: bool = True
    encoding: str = "none"
    encoding_options: dict[str, Any] = field(default_factory=dict)
    position_layers: tuple[int, ...] | None = None
    score_scale: float | None = None
    tie_embeddings: bool = False
    logit_scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        set_ = functools.partial(object.__setattr__, self)  # the dataclass is frozen
        for name in ("d_vocab", "n_ctx", "n_layers", "d_model", "n_heads"):
            check_size(name, getattr(self, name))
        if self.d_head is None:
            if self.d_model % self.n_heads:
                raise ProbeError(f"d_model ({self.d_model}) must be divisible by n_heads ({self.n_heads})")
            set_("d_head", self.d_model // self.n_heads)
        if self.n_kv_heads is None:
            set_("n_kv_heads", self.n_heads)
        if self.d_mlp is None:
            set_("d_mlp", 4 * self.d_model)
        for name in ("n_kv_heads", "d_head", "d_mlp"):
            check_size(name, getattr(self, name))
        if self.n_heads % self.n_kv_heads:
            raise ProbeError(f"n_heads ({self.n_heads}) must be divisible by n_kv_heads ({self.n_kv_heads})")
        if self.score_scale is None:
            set_("score_scale", self.d_head**-0.5)
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)
        if self.normalization not in NORMALIZATIONS:
            raise unknown_name("normalization", self.normalization, NORMALIZATIONS)
        for name in ("norm_eps", "score_scale", "logit_scale"):
            check_number(name, getattr(self, name))
        check_number("dropout", self.dropout, 0, 1, closed=True)
        for name in ("bias", "tie_embeddings"):
            check_flag(name, getattr(self, name))
        if not isinstance(self.encoding_options, dict):
            raise ProbeError(f"encoding_options must be a mapping, got {self.encoding_options!r}")
        with torch.device("meta"):
            encoding = self._make_encoding()
        if self.position_layers is not None:
            layers = tuple(self.position_layers)
            if not all(isinstance(layer, int) and 0 <= layer < self.n_layers for layer in layers):
                raise ProbeError(f"position_layers must be layers in 0…{self.n_layers - 1}, got {layers}")
            if encoding.embeds:
                raise ProbeError(f"position_layers wants an encoding that acts in attention, got {self.encoding!r}")
            set_("position_layers", layers)

    def _make_encoding(self):
        return make_encoding(
            self.encoding,
            self.encoding_options,
            d_model=self.d_model,
            n_heads=self.n_heads,
            d_head=self.d_head,
            n_ctx=self.n_ctx,
        )

    def sees_position(self, layer: int) -> bool:
        """Whether the encoding acts in that layer's attention."""
        return self.position_layers is None or layer in self.position_layers

    def sites(self) -> list[str]:
        """All site names of such a decoder, in the order in which they are computed."""
        blocks = [f"blocks.{layer}.{site}" for layer in range(self.n_layers) for site in BLOCK_SITES]
        return [*SITES, *blocks]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DecoderConfig":
        """A config from its JSON object; unknown and missing keys are refused."""
        return from_mapping(cls, values, "a decoder's config")

    @classmethod
    def from_json(cls, text: str) -> "DecoderConfig":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ProbeError(f"a decoder's config must be JSON: {error}") from None
        if not isinstance(values, dict):
            raise ProbeError(f"a decoder's config must be a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)


class KVCache:
    """The keys (rotated) and values of the positions seen so far, one pair a layer."""

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


class _Hooks:
    """Calls the hook of a site, if there is one, and takes what it returns in place of the value."""

    def __init__(self, hooks: Mapping[str, Hook], prefix: str = ""):
        self.hooks, self.prefix = hooks, prefix

    def under(self, prefix: str) -> "_Hooks":
        return _Hooks(self.hooks, self.prefix + prefix)

    def has(self, site: str) -> bool:
        return self.prefix + site in self.hooks

    def __call__(self, site: str, value: Tensor) -> Tensor:
        hook = self.hooks.get(self.prefix + site)
        if hook is None:
            return value
        edited = hook(value)
        return value if edited is None else edited


_NO_HOOKS = _Hooks({})


class Attention(nn.Module):
    """Causal self-attention, softmax(score_scale · q kᵀ + bias) v, with grouped key-value heads.

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
        self.q_proj = nn.Linear(config.d_model, config.n_heads * config.d_head, bias=config.bias)
        self.k_proj = nn.Linear(config.d_model, config.n_kv_heads * config.d_head, bias=config.bias)
        self.v_proj = nn.Linear(config.d_model, config.n_kv_heads * config.d_head, bias=config.bias)
        self.o_proj = nn.Linear(config.n_heads * config.d_head, config.d_model, bias=config.bias)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        attention_mask: Float[Tensor, "#batch #head pos key"] | None = None,
        position_embeddings: Rotation | None = None,
        cache: KVCache | None = None,
        fused: bool = False,
        hooks: _Hooks = _NO_HOOKS,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch head pos key"] | None]:
        """The attention output and, unless ``fused``, the pattern.

        ``attention_mask`` is added to the scores (-inf hides a key); None means the plain causal mask.
        """

        def heads(site: str, projection: nn.Linear, n: int) -> Tensor:
            x = projection(hidden_states).unflatten(-1, (n, self.head_dim))
            return hooks(site, x).transpose(1, 2)

        q = heads("hook_q", self.q_proj, self.n_heads)
        k = heads("hook_k", self.k_proj, self.n_kv_heads)
        v = heads("hook_v", self.v_proj, self.n_kv_heads)
        if position_embeddings is not None:
            q, k = rotate(q, position_embeddings), rotate(k, position_embeddings)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        if self.num_key_value_groups > 1:
            k = k.repeat_interleave(self.num_key_value_groups, dim=1)
            v = v.repeat_interleave(self.num_key_value_groups, dim=1)
        z, pattern = (self._fused if fused else self._explicit)(q, k, v, attention_mask, hooks)
        z = hooks("hook_z", z.transpose(1, 2))
        return self.o_proj(z.flatten(-2)), pattern

    def _fused(self, q, k, v, mask, hooks):
        dropout = self.attention_dropout if self.training else 0.0
        # Without a mask there are as many queries as keys, or one query that sees every key.
        causal = mask is None and q.shape[2] > 1
        z = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=self.scaling
        )
        return z, None

    def _explicit(self, q, k, v, mask, hooks):
        scores = (q * self.scaling) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask
        elif q.shape[2] > 1:
            scores = scores.masked_fill(_future(q.shape[2], k.shape[2], q.device), -math.inf)
        scores = hooks("hook_attn_scores", scores)
        pattern = hooks("hook_pattern", scores.softmax(dim=-1))
        dropped = F.dropout(pattern, self.attention_dropout, self.training)
        return dropped @ v, pattern


def _future(n_query: int, n_key: int, device: torch.device) -> Tensor:
    """True where the key comes after the query, the last query standing at the last key."""
    return torch.ones(n_query, n_key, dtype=torch.bool, device=device).triu(n_key - n_query + 1)


class MLP(nn.Module):
    """W_out act(W_in x), or W_out (silu(W_gate x) * W_in x) for swiglu."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        if config.activation == "swiglu":
            self.gate_proj = nn.Linear(config.d_model, config.d_mlp, bias=config.bias)
        self.up_proj = nn.Linear(config.d_model, config.d_mlp, bias=config.bias)
        self.down_proj = nn.Linear(config.d_mlp, config.d_model, bias=config.bias)

    def forward(self, x: Float[Tensor, "batch pos d_model"], hooks: _Hooks = _NO_HOOKS):
        # As in TransformerLens, hook_pre is what enters the activation and hook_post what down_proj reads.
        gated = hasattr(self, "gate_proj")
        pre = hooks("hook_pre", (self.gate_proj if gated else self.up_proj)(x))
        post = self.activation(pre)
        if gated:
            post = post * self.up_proj(x)
        return self.down_proj(hooks("hook_post", post))


def _layer_norm(config: DecoderConfig) -> nn.Module:
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def _rms_norm(config: DecoderConfig) -> nn.Module:
    return nn.RMSNorm(config.d_model, eps=config.norm_eps)


def _no_norm(config: DecoderConfig) -> nn.Module:
    return nn.Identity()


NORMALIZATIONS: dict[str, Callable[[DecoderConfig], nn.Module]] = {
    "layer": _layer_norm,
    "rms": _rms_norm,
    "none": _no_norm,
}


class Block(nn.Module):
    """One layer: attention, then MLP, each reading the normalised stream and writing into it."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        norm = NORMALIZATIONS[config.normalization]
        self.attention_norm, self.attention = norm(config), Attention(config, layer)
        self.mlp_norm, self.mlp = norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        attention_mask: Tensor | None = None,
        position_embeddings: Rotation | None = None,
        hooks: _Hooks | None = None,
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
        x = at("hook_resid_mid", x + self.dropout(at("hook_attn_out", out)))
        out = self.mlp(self.mlp_norm(x), **mlp)
        return at("hook_resid_post", x + self.dropout(at("hook_mlp_out", out)))


class Decoder(nn.Module):
    """A causal decoder with any position encoding: ``decoder(tokens) -> logits``."""

    def __init__(self, config: DecoderConfig, seed: int | None = 0):
        """A decoder with freshly drawn weights; ``seed=None`` leaves them undrawn, any numbers, to be written over.

        The weights are a function of the seed: torch's global generator is neither read nor moved.
        """
        super().__init__()
        self.config = config
        with torch.device("meta"):  # keeps torch's layers from drawing weights of their own
            self.token_embedding = nn.Embedding(config.d_vocab, config.d_model)
            self.encoding = config._make_encoding()
            self.dropout = nn.Dropout(config.dropout)
            self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
            self.final_norm = NORMALIZATIONS[config.normalization](config)
            self.head = nn.Linear(config.d_model, config.d_vocab, bias=False)
        self.to_empty(device="cpu")
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        if seed is not None:
            self.reset_parameters(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights: linear maps N(0, 1/d_in), those that write into the stream divided by sqrt(2 n_layers)
        (Radford et al. 2019), embeddings N(0, 1) (N(0, 1/d_model) where the head is tied to them), biases 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith(("o_proj", "down_proj")):
                    std /= math.sqrt(2 * self.config.n_layers)
                nn.init.normal_(module.weight, std=std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
        embedding_std = self.config.d_model**-0.5 if self.config.tie_embeddings else 1.0
        nn.init.normal_(self.token_embedding.weight, std=embedding_std, generator=generator)
        self.encoding.reset_parameters(generator)

    @property
    def device(self) -> torch.device:
        return self.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.token_embedding.weight.dtype

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        positions: Int[Tensor, "all_positions"] | None = None,
        cache: KVCache | None = None,
        hooks: Mapping[str, Hook] | None = None,
        attention: str = "auto",
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits before the softmax, each row from the tokens up to and with its own.

        Args:
            tokens: ids in 0…d_vocab-1.
            positions: the 0-based position of each column; by default 0, 1, 2, … (after what the cache holds).
            cache: keys and values of an earlier prefix; this call's are appended to it.
            hooks: functions by site name. Each is called with the value at its site; what it returns, if anything,
                replaces the value.
            attention: "fused" (one kernel, no pattern is ever held), "explicit" (scores, softmax, product), or
                "auto": explicit where a hook wants scores or patterns, or at short lengths on a CPU.

        Raises:
            ProbeError: for an empty batch, ids outside the vocabulary, a site that does not exist, or a position
                beyond a learned table.
        """
        self._check(tokens, hooks, attention)
        past = 0 if cache is None else cache.length
        n_query, n_key = tokens.shape[1], past + tokens.shape[1]
        key_positions = torch.arange(n_key) if positions is None else positions.cpu()
        if len(key_positions) != n_key:
            raise ProbeError(f"positions must name all {n_key} positions (cached ones too), got {len(key_positions)}")
        query_positions = key_positions[past:]
        sees_scores = hooks is not None and any(s.endswith(("hook_attn_scores", "hook_pattern")) for s in hooks)
        if attention == "auto":
            short_on_cpu = tokens.device.type == "cpu" and n_key <= EXPLICIT_LENGTH_ON_CPU
            attention = "explicit" if sees_scores or short_on_cpu else "fused"
        fused = attention == "fused"
        if fused and sees_scores:
            raise ProbeError("fused attention holds no scores and no pattern: hook them with attention='explicit'")

        at = _Hooks(hooks) if hooks else None
        x = self.token_embedding(tokens)
        if at is not None:
            x = at("hook_embed", x)
        x = self.dropout(self.encoding.embed(x, query_positions))
        # None stands for the plain causal mask, which the fused kernel knows by itself.
        plain = None
        if n_query > 1 and (n_query < n_key or not fused):
            plain = x.new_zeros(1, 1, n_query, n_key).masked_fill(_future(n_query, n_key, x.device), -math.inf)
        bias = self.encoding.bias(query_positions, key_positions, x)
        positional = plain
        if bias is not None:
            positional = bias[None].masked_fill(_future(n_query, n_key, x.device), -math.inf)
        rotation = self.encoding.rotation(query_positions, x)
        extra: dict[str, Any] = {"fused": True} if fused else {}
        if cache is not None:
            extra["cache"] = cache
        for layer, block in enumerate(self.layers):
            seen = self.config.sees_position(layer)
            x = block(
                x,
                attention_mask=positional if seen else plain,
                position_embeddings=rotation if seen else None,
                hooks=at and at.under(f"blocks.{layer}."),
                **extra,
            )
        if cache is not None:
            cache.length = n_key
        logits = self.head(self.final_norm(x))
        return logits if self.config.logit_scale == 1 else logits * self.config.logit_scale

    def _check(self, tokens: Tensor, hooks: Mapping[str, Hook] | None, attention: str) -> None:
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ProbeError(f"tokens must be integers of shape (batch, pos), got {tokens.dtype} {tuple(tokens.shape)}")
        if tokens.numel() == 0:
            raise ProbeError(f"tokens must hold at least one sequence of one token, got shape {tuple(tokens.shape)}")
        if attention not in ATTENTION_PATHS:
            raise unknown_name("attention path", attention, ATTENTION_PATHS)
        # Elsewhere than on the CPU this would wait for the device at every call; there the kernel asserts it.
        if tokens.device.type == "cpu":
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.d_vocab:
                raise ProbeError(f"token ids must lie in 0…{self.config.d_vocab - 1}, got {low}…{high}")
        if hooks:
            sites = self.config.sites()
            for site in hooks:
                if site not in sites:
                    raise ProbeError(
                        f"unknown site {site!r}; a decoder's sites: {SITES[0]}, blocks.<layer>.<one of "
                        f"{', '.join(BLOCK_SITES)}> for layers 0…{self.config.n_layers - 1}"
                    )
