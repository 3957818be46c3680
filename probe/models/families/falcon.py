"""Falcon, and RefinedWeb, as it was called before."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from probe.errors import ProbeError
from probe.models.config import DecoderConfig
from probe.models.families.base import Family, Shape, Split, Weight, by_head
from probe.models.families.fields import Fields
from probe.models.families.gpt2 import ACTIVATIONS
from probe.models.families.rope import rotary_options

N_CTX = 2048  # of the released ones; the config need not say

# The norms of a layer, by whether attention and MLP stand side by side, and how many norms are before them.
NORMS: dict[tuple[bool, int], Mapping[str, str | tuple[str, ...]]] = {
    (False, 1): {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    (True, 1): {"input_layernorm": ("attention_norm", "mlp_norm")},
    (True, 2): {"ln_attn": "attention_norm", "ln_mlp": "mlp_norm"},
}


class Falcon(Family):
    """LayerNorm, rotary positions or ALiBi, a key for one or many heads, attention and MLP side by side or in turn.

    Almazrouei et al. 2023; Penedo et al. 2023. With ``new_decoder_architecture`` (40B, 180B, 11B) heads are grouped and
    a layer has two norms, unless the config says 1; without it ``multi_query`` and ``parallel_attn`` say what there is.
    Where one norm serves attention and MLP, both of ours are copies of it. ALiBi is rounded as theirs (``AlibiKeys``).
    """

    positions = "rotary, or ALiBi on keys in bfloat16 (RW)"
    prefix = "transformer."
    outer: Mapping[str, str] = {"word_embeddings": "token_embedding", "ln_f": "final_norm", "lm_head": "head"}
    layers = "h."
    modules: Mapping[str, str | tuple[str, ...]] = {
        "self_attention.query_key_value": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "self_attention.dense": "attention.o_proj",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    own_code = True  # the released ones bring the code from which Hugging Face's was made
    new = False  # the architecture, where the config does not say

    def config(self, fields: Fields) -> DecoderConfig:
        fields.only("apply_residual_connection_post_layernorm", False)
        n_heads = fields.size("num_attention_heads", "n_head")
        d_model = fields.size("hidden_size", "n_embed")
        new = fields.flag("new_decoder_architecture", default=self.new)
        if new:
            fields.only("parallel_attn", True)
        parallel = fields.flag("parallel_attn", default=True)
        n_norms = fields.size("num_ln_in_parallel_attn", default=2 if new else 1)
        if n_norms > (2 if new else 1):
            raise ProbeError(
                f"{fields.path}: 'num_ln_in_parallel_attn' must be {'1, 2' if new else '1'} or absent, got {n_norms}"
            )
        self.layer = {**NORMS[parallel, n_norms], **self.modules}
        return DecoderConfig(
            d_vocab=fields.size("vocab_size"),
            n_ctx=fields.size("max_position_embeddings", default=N_CTX),
            n_layers=fields.size("num_hidden_layers", "n_layer"),
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=self.n_kv_heads(fields, n_heads, new),
            d_mlp=fields.size("ffn_hidden_size", default=4 * d_model),
            activation=fields.choice("activation", ACTIVATIONS, default="gelu"),
            norm_eps=fields.number("layer_norm_epsilon", default=1e-5),
            bias=True if fields.flag("bias", default=False) else ("norm",),
            tie_embeddings=fields.flag("tie_word_embeddings", default=True),
            parallel=parallel,
            # More heads than dimensions are refused by the config itself.
            **self.position(fields, max(1, d_model // n_heads)),
        )

    def n_kv_heads(self, fields: Fields, n_heads: int, new: bool) -> int:
        """How many heads have a key and a value."""
        names = ("num_kv_heads", "n_head_kv")
        if new:
            return fields.size(*names, default=n_heads)
        if fields.flag("multi_query", default=True):
            return 1  # whatever the config says beside
        for name in names:
            fields.only(name, n_heads)
        return n_heads

    def position(self, fields: Fields, d_head: int) -> dict[str, Any]:
        """The fields of the config that say where the model has its positions from."""
        if fields.flag("alibi", default=False):
            return {"encoding": "alibi_keys", "encoding_options": {"scale": d_head**-0.5, "rounded": "bfloat16"}}
        options = rotary_options(fields, d_head=d_head, n_ctx=fields.size("max_position_embeddings", default=N_CTX))
        if "fraction" in options:
            raise ProbeError(f"{fields.path}: 'partial_rotary_factor' must be 1 or absent: a Falcon turns whole heads")
        return {"encoding": "rotary", "encoding_options": options}

    def split(self, config: DecoderConfig) -> Split:
        return by_head(config.n_kv_heads)

    def weights(self, config: DecoderConfig, ours: Mapping[str, Shape]) -> Iterator[Weight]:
        for weight in super().weights(config, ours):
            norms = len(weight.names) > 1 and weight.names[0].endswith(("_norm.weight", "_norm.bias"))
            yield dataclasses.replace(weight, shared=True) if norms else weight


class RefinedWeb(Falcon):
    """Falcon-40B under its older name: grouped heads and two norms, though its config does not say so."""

    new = True
