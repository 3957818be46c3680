"""A head that counts: absolute position out of attention alone, without any MLP."""

import math
from collections.abc import Mapping

import torch

from constructions.absolute import PositionInARow
from constructions.construction import Construction
from constructions.layout import IS_BOS, ONE, POSITION, Layout, write_embeddings
from constructions.weights import write_head
from probe.models.decoder import Decoder

# The largest deviation of the counting head from a straight line, in positions, at the end of its length.
CURVATURE = 0.05


def counting_score(length: int) -> float:
    """The score c of ``<bos>``, in nats, with which a head counts up to ``length`` tokens; a multiple of 2^-16, so that
    float32 holds it.

    All other keys have the score 0. Of the attention of a query with p = t - 1 other keys, each of these gets

        ε / (1 + p ε),  where ε = e^{-c},

    and all of them together p ε / (1 + p ε): a straight line in p, but for the share p ε of it. With
    ε = CURVATURE / length² the line is off by p² ε < CURVATURE positions.
    """
    return math.ceil(math.log(length**2 / CURVATURE) * 2**16) / 2**16


class CountingHead(PositionInARow):
    """Position from one attention head and nothing else.

    Theorem 1 of Kazemnejad et al. 2023 reads 1/t from the attention to ``<bos>`` and wants an MLP of some width to
    turn it round. A head that almost only attends to ``<bos>``, with a value of 0 there and of 1 elsewhere, returns
    the position itself, up to a constant factor.
    """

    name = "counting_head"
    source = "a saturated head in place of the uniform one of Kazemnejad et al. 2023, Theorem 1"
    layers, attention_layers, mlp_layers = 1, 1, 0
    # Measured: the curvature, .05. In float32 the sum over keys rounds, by how a processor's kernels go about it: on
    # one (AVX-512 with AMX) .06 at 32,768, .29 at 65,536 and .70 at 131,072; on another (AVX-512 alone) .13 at 4,096,
    # .55 at 8,192, where rounding to the nearest integer no longer gives t, and 41 at 65,536. What holds on both is
    # claimed.
    max_length: Mapping[torch.dtype, int] = {torch.float64: 131_072, torch.float32: 4_096}
    tolerance: Mapping[torch.dtype, Mapping[str, float]] = {
        torch.float64: {"position": 1.1 * CURVATURE, "content": 0.0},
        torch.float32: {"position": 0.4, "content": 0.0},
    }

    def layout(self, length: int) -> Layout:
        return Layout(not_bos=1)

    def width(self, length: int) -> int:
        return 1

    def write_weights(self, decoder: Decoder, length: int, dtype: torch.dtype) -> None:
        layout, c = self.layout(length), counting_score(length)
        write_embeddings(decoder, layout)
        # z = p ε / (1 + p ε) (``counting_score``). The output takes it times e^c = 1/ε into row POSITION, and the
        # bias adds 1, since <bos> stands at t = 1: row POSITION = 1 + p - p² ε + … = t, off by less than CURVATURE.
        write_head(
            decoder,
            layer=0,
            head=0,
            query={(ONE, 0): c / decoder.config.score_scale},
            key={(IS_BOS, 0): 1.0},
            value={(layout.row("not_bos"), 0): 1.0},
            output={(0, POSITION): math.exp(c)},
        )
        decoder.layers[0].attention.o_proj.bias[POSITION] = 1.0


CONSTRUCTIONS: dict[str, Construction] = {"counting_head": CountingHead()}
