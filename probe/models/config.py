"""A decoder's shape, validated, and the names of what can be seen inside."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from probe.config import FILL, MOST_SIZE, Filled, check_flag, check_name, check_number, check_size, from_mapping
from probe.errors import ProbeError
from probe.models.attention_functions import ATTENTION_FUNCTIONS, AttentionFunction, make_attention_function
from probe.models.encodings import PositionEncoding, make_encoding
from probe.models.undrawn import undrawn

# What a hook can see. hook_embed is the token embedding alone, behind its norm if it has one and before any position is
# added. Between attention and MLP a parallel block has no stream: no hook_resid_mid. Shapes: residual stream "batch pos
# d_model"; q, k, v, z "batch pos head d_head" (k and v with n_kv_heads, q and k before any rotation); rot_q
# and rot_k are q and k as they enter the scores, after the rotation if the layer has one and after the attention
# function's scale of q; scores and pattern "batch head query key"; mlp "batch pos d_mlp". Scores are those that enter
# the softmax (or what stands in its place): scaled, with the encoding's bias, -inf where the key is in the future.
SITES = ("hook_embed",)
BLOCK_SITES = (
    "hook_resid_pre",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
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


def sites_of_block(parallel: bool) -> list[str]:
    """The site names of a block, a ``parallel`` one or not, in the order of the computation."""
    return [site for site in BLOCK_SITES if not (parallel and site == "hook_resid_mid")]


def sites_of_layers(n_layers: int, parallel: bool) -> list[str]:
    """All site names of a decoder with so many blocks."""
    return [*SITES, *(f"blocks.{layer}.{site}" for layer in range(n_layers) for site in sites_of_block(parallel))]


# "gelu" is x Φ(x); "gelu_tanh" its approximation by tanh, as in GPT-2 and BLOOM (Hendrycks and Gimpel 2016, section 2).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "swiglu": F.silu,
}

# The parts that may have biases: LayerNorms, the projections to queries, keys and values, that out of the heads, MLPs.
BIASED_PARTS = ("norm", "qkv", "attn_out", "mlp")

# Each makes a norm from (d_model, eps, bias).
NORMALIZATIONS: dict[str, Callable[[int, float, bool], nn.Module]] = {
    "layer": lambda d_model, eps, bias: nn.LayerNorm(d_model, eps=eps, bias=bias),
    "rms": lambda d_model, eps, bias: nn.RMSNorm(d_model, eps=eps),
    "none": lambda d_model, eps, bias: nn.Identity(),
}


# Fields that came later: those of a group are not written where all have their defaults, so that what was begun before
# there was a choice can go on.
LATER_FIELDS = (("attention_function", "attention_options"), ("parallel",), ("embedding_norm",), ("windows",))


# Beyond anything that was ever trained, and yet small enough to be refused by the shapes of a file's tensors, in a
# second and without memory: sizes are claims of whoever wrote a config.
MOST: dict[str, int] = {
    "d_vocab": MOST_SIZE,
    "n_ctx": MOST_SIZE,
    "n_layers": 1024,
    **dict.fromkeys(("d_model", "n_heads", "n_kv_heads", "d_head"), 2**20),
    "d_mlp": 2**24,
}
MOST_ATTENTION = 2**24  # n_heads · d_head


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that fixes a decoder's shape. Validated when made; JSON there and back.

    ``None`` stands for the usual choice: ``n_kv_heads`` = n_heads, ``d_head`` = d_model / n_heads, ``d_mlp`` =
    4 d_model, ``score_scale`` = d_head^-1/2 (T5 uses 1), ``position_layers`` = every layer.

    ``bias`` says whether there are biases, or which of ``BIASED_PARTS`` have them. In a ``parallel`` decoder attention
    and MLP read the same stream, x + Attention(norm_1(x)) + MLP(norm_2(x)), as in GPT-NeoX (Black et al. 2022, section
    2.1). ``embedding_norm`` puts a norm behind the token embedding, as in BLOOM (Le Scao et al. 2022, section 3.2).

    With ``windows`` a query sees its own key and the nearest before it, so many in all: a sliding window, of one width
    in all layers or of its own in each (None: no window). With ``position_layers`` this is the hybrid of many released
    models: layers with rotary positions and a window, and some without either (Cohere 2, EXAONE 4, Llama 4).
    """

    d_vocab: int  #: token ids
    n_ctx: int  #: the context that it is made for, in tokens; a learned table ends there, nothing else does
    n_layers: int  #: blocks
    d_model: int  #: width of the residual stream
    n_heads: int  #: query heads of a layer
    n_kv_heads: Filled[int] = FILL  #: heads of keys and values, of which each serves n_heads / n_kv_heads query heads
    d_head: Filled[int] = FILL  #: dimensions of a head
    d_mlp: Filled[int] = FILL  #: units of an MLP
    activation: str = "gelu"  #: "relu", "gelu", "gelu_tanh" or "swiglu"
    normalization: str = "layer"  #: "layer", "rms" or "none"
    norm_eps: float = 1e-5  #: what norms add to the variance, or to the mean square
    bias: bool | tuple[str, ...] = True  #: whether linear maps have one, or which parts of a layer
    encoding: str = "none"  #: a name in ``ENCODINGS``
    encoding_options: dict[str, Any] = field(default_factory=dict)  #: the encoding's own options
    position_layers: tuple[int, ...] | None = None  #: the layers that see position, 0-based
    score_scale: Filled[float] = FILL  #: what q·k is multiplied with
    tie_embeddings: bool = False  #: whether the head is the token embedding
    logit_scale: float = 1.0  #: what logits are multiplied with
    dropout: float = 0.0  #: share of the numbers that training sets to 0
    attention_function: str = "softmax"  #: a name in ``ATTENTION_FUNCTIONS``
    attention_options: dict[str, Any] = field(default_factory=dict)  #: the attention function's own options
    parallel: bool = False  #: whether attention and MLP read the same stream
    embedding_norm: bool = False  #: whether a norm stands behind the token embedding
    windows: int | tuple[int | None, ...] | None = None  #: how many keys a query sees at most, in each layer or in all

    def __post_init__(self) -> None:
        set_ = functools.partial(object.__setattr__, self)  # the dataclass is frozen
        for name in ("d_vocab", "n_ctx", "n_layers", "d_model", "n_heads"):
            check_size(name, getattr(self, name), most=MOST[name])
        if self.d_head is None:
            if self.d_model % self.n_heads:
                raise ProbeError(f"d_model ({self.d_model}) must be divisible by n_heads ({self.n_heads})")
            set_("d_head", self.d_model // self.n_heads)
        if self.n_kv_heads is None:
            set_("n_kv_heads", self.n_heads)
        if self.d_mlp is None:
            set_("d_mlp", 4 * self.d_model)
        for name in ("n_kv_heads", "d_head", "d_mlp"):
            check_size(name, getattr(self, name), most=MOST[name])
        if self.n_heads * self.d_head > MOST_ATTENTION:
            raise ProbeError(f"n_heads · d_head must be at most {MOST_ATTENTION}, got {self.n_heads} · {self.d_head}")
        if self.n_heads % self.n_kv_heads:
            raise ProbeError(f"n_heads ({self.n_heads}) must be divisible by n_kv_heads ({self.n_kv_heads})")
        if self.score_scale is None:
            set_("score_scale", self.d_head**-0.5)
        check_name("activation", self.activation, ACTIVATIONS)
        check_name("normalization", self.normalization, NORMALIZATIONS)
        for name in ("norm_eps", "score_scale", "logit_scale"):
            check_number(name, getattr(self, name))
        check_number("dropout", self.dropout, 0, 1, closed=True)
        set_("bias", _checked_bias(self.bias))
        for name in ("tie_embeddings", "parallel", "embedding_norm"):
            check_flag(name, getattr(self, name))
        for name in ("encoding_options", "attention_options"):
            if not isinstance(getattr(self, name), dict):
                raise ProbeError(f"{name} must be a mapping, got {getattr(self, name)!r}")
        with undrawn():
            encoding = self.make_encoding()
            self.make_attention_function()
        if self.position_layers is not None:
            layers = self.position_layers
            if not isinstance(layers, tuple | list) or not all(map(self._is_layer, layers)):
                raise ProbeError(f"position_layers must be layers in 0…{self.n_layers - 1}, got {layers!r}")
            if encoding.embeds:
                raise ProbeError(f"position_layers wants an encoding that acts in attention, got {self.encoding!r}")
            set_("position_layers", tuple(layers))
        if isinstance(self.windows, list | tuple):
            if len(self.windows) != self.n_layers:
                raise ProbeError(f"windows must be one for each of {self.n_layers} layers, got {len(self.windows)}")
            set_("windows", tuple(self.windows))
        for window in self.windows if isinstance(self.windows, tuple) else (self.windows,):
            if window is not None:
                check_size("windows", window)

    def _is_layer(self, layer: object) -> bool:
        return isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < self.n_layers

    def make_norm(self) -> nn.Module:
        """A new norm of such a decoder."""
        return NORMALIZATIONS[self.normalization](self.d_model, self.norm_eps, self.has_bias("norm"))

    def has_bias(self, part: str) -> bool:
        """Whether one of ``BIASED_PARTS`` has biases."""
        return self.bias if isinstance(self.bias, bool) else part in self.bias

    def make_encoding(self) -> PositionEncoding:
        """A new, undrawn encoding of such a decoder."""
        return make_encoding(
            self.encoding,
            self.encoding_options,
            d_model=self.d_model,
            n_heads=self.n_heads,
            d_head=self.d_head,
            n_ctx=self.n_ctx,
            n_layers=self.n_layers,
        )

    def make_attention_function(self) -> AttentionFunction:
        """A new, undrawn attention function of a layer of such a decoder."""
        return make_attention_function(
            self.attention_function,
            self.attention_options,
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_ctx=self.n_ctx,
        )

    @property
    def is_softmax(self) -> bool:
        """Whether a pattern is the softmax of its scores."""
        return ATTENTION_FUNCTIONS[self.attention_function].is_softmax

    @property
    def has_temperature(self) -> bool:
        """Whether queries are multiplied by a number that depends on how many keys they see."""
        return ATTENTION_FUNCTIONS[self.attention_function].query_scale is not AttentionFunction.query_scale

    def sees_position(self, layer: int) -> bool:
        """Whether the encoding acts in that layer's attention."""
        return self.position_layers is None or layer in self.position_layers

    def window(self, layer: int) -> int | None:
        """How many keys a query of that layer sees at most, its own included; None for all up to its own."""
        return self.windows[layer] if isinstance(self.windows, tuple) else self.windows

    def sites(self) -> list[str]:
        """All site names of such a decoder, in the order in which they are computed."""
        return sites_of_layers(self.n_layers, self.parallel)

    def to_json(self) -> str:
        """What stands in a checkpoint's ``config.json``."""
        values = dataclasses.asdict(self)
        for group in LATER_FIELDS:
            if all(values[name] == _DEFAULTS[name] for name in group):
                for name in group:
                    del values[name]
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DecoderConfig":
        """A config from its JSON object; unknown and missing keys are refused."""
        return from_mapping(cls, values, "a decoder's config")

    @classmethod
    def from_json(cls, text: str) -> "DecoderConfig":
        """A config from the text of a checkpoint's ``config.json``."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProbeError(f"a decoder's config must be JSON: {error}") from None
        if not isinstance(values, dict):
            raise ProbeError(f"a decoder's config must be a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)


def _checked_bias(bias: Any) -> bool | tuple[str, ...]:
    """What ``bias`` says, in the one way in which it is written: all parts are True and none is False."""
    if isinstance(bias, bool):
        return bias
    if not isinstance(bias, tuple | list) or any(part not in BIASED_PARTS for part in bias):
        raise ProbeError(f"bias must be true, false or a list of parts out of {', '.join(BIASED_PARTS)}, got {bias!r}")
    parts = tuple(part for part in BIASED_PARTS if part in bias)
    return parts if 0 < len(parts) < len(BIASED_PARTS) else bool(parts)


_DEFAULTS = {
    field.name: field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    for field in dataclasses.fields(DecoderConfig)
    if any(field.name in group for group in LATER_FIELDS)
}
