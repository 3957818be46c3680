"""McGill's decoder-only T5: codellm_1b with no positions, rotary ones or ALiBi."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from probe.models.config import DecoderConfig
from probe.models.families.base import Family, Shape, Split, Weight
from probe.models.families.fields import Fields

N_CTX = 1024  # of the released ones; the config does not say

FRACTION = 0.25  # of each head that rotary positions turn, whatever the config says

ROTARY = ("rotary", {"fraction": FRACTION})
ENCODINGS = {
    "none": ("none", {}),
    "rotary": ROTARY,
    "rotary_rerun": ROTARY,
    "new_rotary": ROTARY,
    "alibi": ("alibi", {}),
}


def half_split(n_heads: int, width: int) -> Split:
    """The first ``width`` rows of each head, where the two of a plane are neighbours, with the first of all planes
    before the second of all: queries and keys have the same products."""

    def split(theirs: Tensor, rows: list[int]) -> Sequence[Tensor]:
        heads = theirs.unflatten(0, (n_heads, -1))
        turned = [heads[:, 0:width:2], heads[:, 1:width:2], heads[:, width:]]
        return [torch.cat(turned, dim=1).flatten(0, 1)]

    return split


class CustomT5(Family):
    """T5's decoder without its cross-attention: RMSNorm, unscaled scores, no bias. Kazemnejad et al. 2023, appendix F.

    Files hold the cross-attention and a table of T5's own bias, which are never used.
    """

    positions = "none, rotary in a quarter of each head, or ALiBi"
    oracle = "T5's blocks, and the papers' formulas"
    outer: Mapping[str, str] = {
        "shared": "token_embedding",
        "decoder.final_layer_norm": "final_norm",
        "lm_head": "head",
    }
    layers = "decoder.block."
    layer: Mapping[str, str | tuple[str, ...]] = {
        "layer.0.layer_norm": "attention_norm",
        "layer.0.SelfAttention.q": "attention.q_proj",
        "layer.0.SelfAttention.k": "attention.k_proj",
        "layer.0.SelfAttention.v": "attention.v_proj",
        "layer.0.SelfAttention.o": "attention.o_proj",
        "layer.2.layer_norm": "mlp_norm",
        "layer.2.DenseReluDense.wi": "mlp.up_proj",
        "layer.2.DenseReluDense.wo": "mlp.down_proj",
    }
    ignored = (
        r"decoder\.block\.\d+\.layer\.1\..*"
        r"|decoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight"
        r"|decoder\.(embed_tokens|fixed_rotary_embedding\.embed)\.weight"
    )
    own_code = True  # that from which this was written

    def config(self, fields: Fields) -> DecoderConfig:
        encoding, options = fields.choice("position_encoding_type", ENCODINGS)
        d_model = fields.size("d_model")
        tied = fields.flag("tie_word_embeddings", default=True)
        return DecoderConfig(
            d_vocab=fields.size("vocab_size"),
            n_ctx=N_CTX,
            n_layers=fields.size("num_layers"),
            d_model=d_model,
            n_heads=fields.size("num_heads"),
            d_head=fields.size("d_kv"),
            d_mlp=fields.size("d_ff"),
            activation=fields.choice("feed_forward_proj", {"relu": "relu"}, default="relu"),
            normalization="rms",
            norm_eps=fields.number("layer_norm_epsilon", default=1e-6),
            bias=False,
            encoding=encoding,
            encoding_options=dict(options),
            score_scale=1.0,
            tie_embeddings=tied,
            logit_scale=d_model**-0.5 if tied else 1.0,
        )

    def weights(self, config: DecoderConfig, ours: Mapping[str, Shape]) -> Iterator[Weight]:
        turned = half_split(config.n_heads, int(FRACTION * config.d_head))
        for weight in super().weights(config, ours):
            is_turned = config.encoding == "rotary" and weight.key.endswith((".q.weight", ".k.weight"))
            yield dataclasses.replace(weight, split=turned) if is_turned else weight
