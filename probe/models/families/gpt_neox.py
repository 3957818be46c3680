"""GPT-NeoX and Pythia."""

from collections.abc import Mapping

from probe.models.config import DecoderConfig
from probe.models.families.base import Family, Split, by_head
from probe.models.families.fields import Fields
from probe.models.families.gpt2 import ACTIVATIONS
from probe.models.families.rope import rotary_options


class GPTNeoX(Family):
    """LayerNorm, attention and MLP side by side, rotary positions in a quarter of each head.

    Black et al. 2022, section 2.1; Biderman et al. 2023. The rows of a head's query, key and value stand together.
    """

    positions = "rotary in a quarter of each head"
    prefix = "gpt_neox."
    synonyms: Mapping[str, str] = {"embed_out.weight": "lm_head.weight"}
    outer: Mapping[str, str] = {"embed_in": "token_embedding", "final_layer_norm": "final_norm", "lm_head": "head"}
    layers = "layers."
    layer: Mapping[str, str | tuple[str, ...]] = {
        "input_layernorm": "attention_norm",
        "attention.query_key_value": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attention.dense": "attention.o_proj",
        "post_attention_layernorm": "mlp_norm",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    ignored = r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"

    def config(self, fields: Fields) -> DecoderConfig:
        n_ctx, n_heads, d_model = (
            fields.size(name) for name in ("max_position_embeddings", "num_attention_heads", "hidden_size")
        )
        rotary = rotary_options(
            fields,
            d_head=d_model // n_heads,
            n_ctx=n_ctx,
            fraction=0.25,
            base_key="rotary_emb_base",
            fraction_key="rotary_pct",
        )
        return DecoderConfig(
            d_vocab=fields.size("vocab_size"),
            n_ctx=n_ctx,
            n_layers=fields.size("num_hidden_layers"),
            d_model=d_model,
            n_heads=n_heads,
            d_mlp=fields.size("intermediate_size"),
            activation=fields.choice("hidden_act", ACTIVATIONS, default="gelu"),
            norm_eps=fields.number("layer_norm_eps", default=1e-5),
            bias=True if fields.flag("attention_bias", default=True) else ("norm", "mlp"),
            encoding="rotary",
            encoding_options=rotary,
            tie_embeddings=fields.flag("tie_word_embeddings", default=False),
            parallel=fields.flag("use_parallel_residual", default=True),
        )

    def split(self, config: DecoderConfig) -> Split:
        return by_head(config.n_heads)
