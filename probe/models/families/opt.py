"""OPT."""

import dataclasses
from collections.abc import Iterator, Mapping

from probe.models.config import DecoderConfig
from probe.models.families.base import Family, Shape, Weight
from probe.models.families.fields import Fields
from probe.models.families.gpt2 import ACTIVATIONS

OFFSET = 2  # of positions in their table: its first two rows are never read


class OPT(Family):
    """LayerNorm, learned positions, ReLU, a tied head. Zhang et al. 2022.

    OPT-350M, which has its norms behind attention and MLP, and narrower embeddings, is refused.
    """

    positions = "learned"
    prefix = "model.decoder."
    outer: Mapping[str, str] = {
        "embed_tokens": "token_embedding",
        "embed_positions": "encoding",
        "final_layer_norm": "final_norm",
        "lm_head": "head",
    }
    layers = "layers."
    layer: Mapping[str, str | tuple[str, ...]] = {
        "self_attn_layer_norm": "attention_norm",
        "self_attn.q_proj": "attention.q_proj",
        "self_attn.k_proj": "attention.k_proj",
        "self_attn.v_proj": "attention.v_proj",
        "self_attn.out_proj": "attention.o_proj",
        "final_layer_norm": "mlp_norm",
        "fc1": "mlp.up_proj",
        "fc2": "mlp.down_proj",
    }
    ignored = "version"

    def config(self, fields: Fields) -> DecoderConfig:
        fields.only("do_layer_norm_before", True)
        fields.only("_remove_final_layer_norm", False)
        fields.only("layer_norm_elementwise_affine", True)
        d_model = fields.size("hidden_size")
        fields.only("word_embed_proj_dim", d_model)
        return DecoderConfig(
            d_vocab=fields.size("vocab_size"),
            n_ctx=fields.size("max_position_embeddings"),
            n_layers=fields.size("num_hidden_layers"),
            d_model=d_model,
            n_heads=fields.size("num_attention_heads"),
            d_mlp=fields.size("ffn_dim"),
            activation=fields.choice("activation_function", ACTIVATIONS, default="relu"),
            bias=True if fields.flag("enable_bias", default=True) else ("norm",),
            encoding="learned",
            tie_embeddings=fields.flag("tie_word_embeddings", default=True),
        )

    def weights(self, config: DecoderConfig, ours: Mapping[str, Shape]) -> Iterator[Weight]:
        for weight in super().weights(config, ours):
            yield dataclasses.replace(weight, unused=OFFSET) if weight.names == ("encoding.weight",) else weight

    def key(self, stored: str) -> str:
        # The first files are those of the decoder alone: "decoder." without "model.".
        return super().key(stored).removeprefix("decoder.")
