"""MPT."""

from collections.abc import Mapping

from probe.models.config import DecoderConfig
from probe.models.families.base import Family
from probe.models.families.fields import Fields

# The same function; the second is computed in half precision where the rest is.
LAYER_NORMS = ("layernorm", "low_precision_layernorm")


class MPT(Family):
    """LayerNorm, ALiBi, a tied head, no bias anywhere. MosaicML 2023."""

    positions = "ALiBi"
    prefix = "transformer."
    outer: Mapping[str, str] = {"wte": "token_embedding", "norm_f": "final_norm", "lm_head": "head"}
    layers = "blocks."
    layer: Mapping[str, str | tuple[str, ...]] = {
        "norm_1": "attention_norm",
        "attn.Wqkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attn.out_proj": "attention.o_proj",
        "norm_2": "mlp_norm",
        "ffn.up_proj": "mlp.up_proj",
        "ffn.down_proj": "mlp.down_proj",
    }
    own_code = True  # the released ones bring the code from which Hugging Face's was made

    def config(self, fields: Fields) -> DecoderConfig:
        # "learned_pos_emb" is not read: where there is ALiBi the released code makes no table of positions.
        fields.only("no_bias", True)
        fields.only("logit_scale", None)
        fields.choice("norm_type", dict.fromkeys(LAYER_NORMS), default="layernorm")
        attention = fields.mapping("attn_config")
        attention.only("attn_type", "multihead_attention")
        attention.only("alibi", True)
        attention.only("alibi_bias_max", 8)
        for name in ("prefix_lm", "qk_ln", "qk_gn", "rope"):
            attention.only(name, False)
        for name in ("clip_qkv", "sliding_window_size"):
            attention.only(name, None)
        d_model = fields.size("d_model", "hidden_size")
        return DecoderConfig(
            d_vocab=fields.size("vocab_size"),
            n_ctx=fields.size("max_seq_len"),
            n_layers=fields.size("n_layers", "num_hidden_layers"),
            d_model=d_model,
            n_heads=fields.size("n_heads", "num_attention_heads"),
            d_mlp=fields.size("expansion_ratio", default=4) * d_model,
            activation="gelu",
            norm_eps=fields.number("layer_norm_epsilon", default=1e-5),
            bias=False,
            encoding="alibi",
            score_scale=attention.number("softmax_scale", default=None),
            tie_embeddings=fields.flag("tie_word_embeddings", default=True),
        )
