"""BLOOM."""

from collections.abc import Mapping

from probe.models.config import DecoderConfig
from probe.models.families.base import Family, Split, by_head
from probe.models.families.fields import Fields

N_CTX = 2048  # of all released ones; the config need not say


class Bloom(Family):
    """LayerNorm, one more behind the word embedding, ALiBi, a tied head. Le Scao et al. 2022, section 3.2.

    The rows of a head's query, key and value stand together.
    """

    positions = "ALiBi"
    prefix = "transformer."
    outer: Mapping[str, str] = {
        "word_embeddings": "token_embedding",
        "word_embeddings_layernorm": "embedding_norm",
        "ln_f": "final_norm",
        "lm_head": "head",
    }
    layers = "h."
    layer: Mapping[str, str | tuple[str, ...]] = {
        "input_layernorm": "attention_norm",
        "self_attention.query_key_value": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "self_attention.dense": "attention.o_proj",
        "post_attention_layernorm": "mlp_norm",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }

    def config(self, fields: Fields) -> DecoderConfig:
        fields.only("apply_residual_connection_post_layernorm", False)
        return DecoderConfig(
            d_vocab=fields.size("vocab_size"),
            n_ctx=fields.size("seq_length", default=N_CTX),
            n_layers=fields.size("n_layer", "num_hidden_layers"),
            d_model=fields.size("n_embed", "hidden_size"),
            n_heads=fields.size("n_head", "num_attention_heads"),
            activation="gelu_tanh",
            norm_eps=fields.number("layer_norm_epsilon", default=1e-5),
            encoding="alibi",
            tie_embeddings=fields.flag("tie_word_embeddings", default=True),
            embedding_norm=True,
        )

    def split(self, config: DecoderConfig) -> Split:
        return by_head(config.n_heads)
