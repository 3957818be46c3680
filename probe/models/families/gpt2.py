"""GPT-2."""

from collections.abc import Mapping

from probe.models.config import DecoderConfig
from probe.models.families.base import Family
from probe.models.families.fields import Fields

# Hugging Face's names of the same functions; "gelu_fast" and "gelu_new" write the approximation differently.
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class GPT2(Family):
    """LayerNorm, learned positions, a tied head. Radford et al. 2019. Its matrices have inputs as rows (``Conv1D``)."""

    positions = "learned"
    prefix = "transformer."
    outer: Mapping[str, str] = {"wte": "token_embedding", "wpe": "encoding", "ln_f": "final_norm", "lm_head": "head"}
    layers = "h."
    layer: Mapping[str, str | tuple[str, ...]] = {
        "ln_1": "attention_norm",
        "attn.c_attn": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attn.c_proj": "attention.o_proj",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    transposed = True
    ignored = r"h\.\d+\.attn\.(bias|masked_bias)"

    def config(self, fields: Fields) -> DecoderConfig:
        fields.only("scale_attn_by_inverse_layer_idx", False)
        d_model = fields.size("n_embd", "hidden_size")
        return DecoderConfig(
            d_vocab=fields.size("vocab_size"),
            n_ctx=fields.size("n_positions", "max_position_embeddings"),
            n_layers=fields.size("n_layer", "num_hidden_layers"),
            d_model=d_model,
            n_heads=fields.size("n_head", "num_attention_heads"),
            d_mlp=fields.size("n_inner", default=4 * d_model),
            activation=fields.choice("activation_function", ACTIVATIONS, default="gelu_new"),
            norm_eps=fields.number("layer_norm_epsilon", default=1e-5),
            encoding="learned",
            score_scale=None if fields.flag("scale_attn_weights", default=True) else 1.0,
            tie_embeddings=fields.flag("tie_word_embeddings", default=True),
        )
