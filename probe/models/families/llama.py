"""Llama and what is built as Llama is: Llama 1 to 3, TinyLlama, SmolLM 1 and 2."""

from collections.abc import Mapping
from typing import Any

from probe.errors import ProbeError
from probe.models.config import DecoderConfig
from probe.models.families.base import Family, full_attention
from probe.models.families.fields import Fields
from probe.models.families.rope import rotary_options


class Llama(Family):
    """RMSNorm, SwiGLU, grouped heads, rotary positions. Touvron et al. 2023; Grattafiori et al. 2024."""

    positions = "rotary"
    prefix = "model."
    outer: Mapping[str, str] = {"embed_tokens": "token_embedding", "norm": "final_norm", "lm_head": "head"}
    layers = "layers."
    layer: Mapping[str, str | tuple[str, ...]] = {
        "input_layernorm": "attention_norm",
        "self_attn.q_proj": "attention.q_proj",
        "self_attn.k_proj": "attention.k_proj",
        "self_attn.v_proj": "attention.v_proj",
        "self_attn.o_proj": "attention.o_proj",
        "post_attention_layernorm": "mlp_norm",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.up_proj",
        "mlp.down_proj": "mlp.down_proj",
    }
    ignored = r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    tied = False  # where the config does not say
    base = 10000.0

    def config(self, fields: Fields) -> DecoderConfig:
        n_ctx, n_heads, d_model = (
            fields.size(name) for name in ("max_position_embeddings", "num_attention_heads", "hidden_size")
        )
        full_attention(fields, n_ctx)
        bias: tuple[str, ...] = ("qkv", "attn_out") if fields.flag("attention_bias", default=False) else ()
        bias += ("mlp",) if fields.flag("mlp_bias", default=False) else ()
        d_head = fields.size("head_dim", default=d_model // n_heads)
        return DecoderConfig(
            d_vocab=fields.size("vocab_size"),
            n_ctx=n_ctx,
            n_layers=fields.size("num_hidden_layers"),
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=fields.size("num_key_value_heads", default=n_heads),
            d_head=d_head,
            d_mlp=fields.size("intermediate_size"),
            activation=fields.choice("hidden_act", {"silu": "swiglu", "swish": "swiglu"}, default="silu"),
            normalization="rms",
            norm_eps=fields.number("rms_norm_eps", default=1e-6),
            bias=bias,
            tie_embeddings=fields.flag("tie_word_embeddings", default=self.tied),
            **self.position(fields, d_head, n_ctx),
        )

    def position(self, fields: Fields, d_head: int, n_ctx: int) -> dict[str, Any]:
        """The fields of the config that say where the model has its positions from."""
        options = rotary_options(fields, d_head=d_head, n_ctx=n_ctx, base=self.base)
        if "fraction" in options:
            raise ProbeError(f"{fields.path}: 'partial_rotary_factor' must be 1 or absent: a Llama turns whole heads")
        return {"encoding": "rotary", "encoding_options": options}
