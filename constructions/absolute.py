"""Absolute position out of no position encoding: one attention head counts, one ReLU layer turns 1/t into t."""

from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from constructions.construction import (
    CONTENT,
    D_MODEL,
    D_VOCAB,
    IS_BOS,
    ONE,
    POSITION,
    Construction,
    observe,
    write_embeddings,
)
from constructions.weights import write_head, write_mlp_units
from probe.models.decoder import Decoder, DecoderConfig


def write_absolute_position(decoder: Decoder, layer: int, length: int) -> None:
    """Weights by which a layer writes the position t = 1…length into row POSITION; ``<bos>`` stands at t = 1.

    It uses head 0 and MLP units 0…length-1 of the layer, and wants rows IS_BOS (1 for ``<bos>``, else 0) and
    POSITION (0) as the embeddings leave them. Kazemnejad et al. 2023, Theorem 1 and its proof in appendix C.
    """
    # Attention writes 1/t. The head has W_Q = W_K = 0 (the paper: all keys equal), so every score is 0 and the softmax
    # over the t visible keys is uniform, 1/t on each. The value is row IS_BOS, which is 1 at one visible key and 0 at
    # the others: z = 1/t · 1, and the output puts it into row POSITION, which was 0.
    # So row POSITION holds #<bos>/t in general: the claim is lost with a second <bos>, and with none.
    write_head(decoder, layer, 0, value={(IS_BOS, 0): 1.0}, output={(0, POSITION): 1.0})

    # The MLP maps x = 1/t to t. The paper appeals to universal approximation; here is the map. Let T = length. f is
    # the piecewise linear function through the points (1/k, k), k = 1…T. Its slope between 1/(k+1) and 1/k is
    #     (k - (k+1)) / (1/k - 1/(k+1)) = -k(k+1),
    # so at the knot 1/k, 1 < k < T, the slope turns by -(k-1)k - (-k(k+1)) = 2k, and from the first knot 1/T on it is
    # -(T-1)T. With one hinge that opens to the right at each knot but the last, x = 1, beyond which x never goes,
    #     f(x) = T - (T-1)T ReLU(x - 1/T) + Σ_{k=2}^{T-1} 2k ReLU(x - 1/k),   x in [1/T, 1].
    # At x = 1/t the hinges with k > t are open, and indeed, by Σ_{k=t+1}^{T-1} 2k = (T-1)T - t(t+1),
    #     f(1/t) = T - (T-1)T/t + (T-1) + [(T-1)T - t(t+1)]/t - 2(T-1-t) = t   for t < T, and f(1/T) = T.
    #
    # The stream already holds x in this row and the MLP's output is added to it: x + MLP = t wants MLP = f(x) - x.
    # As x >= 0, x = ReLU(x) is one more unit, number 0; the hinge at 1/k is unit k - 1.
    #
    # Rounding: of the two terms of size T² all but t cancels, so the error grows like T² times the dtype's epsilon
    # (largest near t = 1, where most hinges are open): in float32 1e-2 at T = 1024, .33 at 4096, 1.5 at 8192; float16
    # cannot hold the weight (T-1)T beyond T = 256.
    k = torch.arange(2, length + 1, dtype=torch.float64)
    knots = torch.cat((torch.zeros(1, dtype=torch.float64), 1 / k))
    turns = torch.cat((-torch.ones(1, dtype=torch.float64), torch.where(k < length, 2 * k, -(k - 1) * k)))
    write_mlp_units(
        decoder,
        layer,
        read={POSITION: torch.ones_like(knots)},
        bias=-knots,
        write={POSITION: turns},
        output_bias={POSITION: float(length)},
    )


class AbsolutePosition(Construction):
    """Kazemnejad et al. 2023, Theorem 1: after the first layer the stream holds the absolute position.

    Quantities:
        position: the largest |row POSITION - t| after the layer, in positions, t = 1 at ``<bos>``. Below 0.5 rounding
            to the nearest integer gives t.
        content: the largest change of any other row from the embedding to the end of the layer, claimed to be 0.
    """

    name = "absolute_position"
    claim = "after layer 0 row 2 of the stream holds the position t (1 at <bos>) and all other rows are as embedded"
    source = "Kazemnejad et al. 2023, Theorem 1"
    layers = 1
    # Measured: position 7e-10 in float64 at 4096; in float32 4e-5, 7e-4, 1e-2 and 4e-2 at 64, 256, 1024 and 2048.
    max_length: ClassVar = {torch.float64: 4096, torch.float32: 2048}
    tolerance: ClassVar = {
        torch.float64: {"position": 1e-8, "content": 0.0},
        torch.float32: {"position": 0.25, "content": 0.0},
    }

    def config(self, length: int) -> DecoderConfig:
        return DecoderConfig(
            d_vocab=D_VOCAB,
            n_ctx=length,
            n_layers=self.layers,
            d_model=D_MODEL,
            n_heads=1,
            d_mlp=length,
            activation="relu",
            normalization="none",
            encoding="none",
            bias=True,
        )

    def write_weights(self, decoder: Decoder, length: int) -> None:
        write_embeddings(decoder)
        write_absolute_position(decoder, layer=0, length=length)

    def errors(self, decoder: Decoder, tokens: Int[Tensor, "batch pos"], attention: str) -> dict[str, float]:
        seen = observe(decoder, tokens, ("hook_embed", "blocks.0.hook_resid_post"), attention=attention)
        embedded, after = seen["hook_embed"], seen["blocks.0.hook_resid_post"]
        t = torch.arange(1, tokens.shape[1] + 1)
        change = (after - embedded).abs()
        untouched = torch.cat((change[..., [ONE, IS_BOS]], change[..., CONTENT]), dim=-1)
        return {"position": (after[..., POSITION] - t).abs().max().item(), "content": untouched.max().item()}


CONSTRUCTIONS: dict[str, Construction] = {"absolute_position": AbsolutePosition()}
