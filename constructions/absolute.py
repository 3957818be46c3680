"""Absolute position out of no position encoding: one attention head counts, one ReLU layer turns 1/t into t.

Here the theorem as it is written, and with the closed form of its MLP: both want as many MLP units as positions.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from constructions.construction import Construction, StreamConstruction
from constructions.layout import IS_BOS, ONE, POSITION, Layout, write_embeddings
from constructions.weights import write_head, write_mlp_units
from probe.models.decoder import Decoder


def write_reciprocal(decoder: Decoder, layer: int, row: int) -> None:
    """Weights by which head 0 of a layer adds 1/t to a row of the stream."""
    # The head has W_Q = W_K = 0 (the paper: all keys equal), so every score is 0 and the softmax over the t visible
    # keys is uniform, 1/t on each. The value is row IS_BOS, which is 1 at one visible key and 0 at the others:
    # z = 1/t · 1. So the row holds #<bos>/t in general: the claim is lost with a second <bos>, and with none.
    # Rounding: exp(0) = 1 and sums of ones are exact, as is adding zeros, so z is 1/t rounded once (measured: bitwise
    # fl(1/t) at all of 131,072 positions in float32, on both paths). A value that is non-zero at other keys would
    # drift.
    write_head(decoder, layer, 0, value={(IS_BOS, 0): 1.0}, output={(0, row): 1.0})


def write_chords(
    decoder: Decoder,
    layer: int,
    x: int,
    knots: Float[Tensor, "knot"],
    outputs: dict[int, tuple[float, float]],
) -> None:
    """Weights by which an MLP adds a · f + b to rows, ``outputs[row] = (a, b)``, f the piecewise linear function of
    row ``x`` that is s at x = 1/s for each knot s = s_0 < s_1 < … < s_n, s_0 = 1; units 0…n-1.
    """
    # f(x) = 1 + Σ_{j=0}^{n-1} c_j ReLU(1 - s_j x) with c_j = s_{j+1} - s_{j-1}, s_{-1} = 0.
    # For 1/s_{m+1} <= x <= 1/s_m the hinges 0…m are open (s_j x <= 1), so there f is linear, with the slope
    #     -Σ_{j<=m} c_j s_j = -Σ_{j<=m} (s_j s_{j+1} - s_{j-1} s_j) = -s_m s_{m+1}        (the sum telescopes),
    # and that is the slope of the chord: (s_{m+1} - s_m) / (1/s_{m+1} - 1/s_m) = -s_m s_{m+1}. At x = 1/s_0 = 1 every
    # hinge is closed and f = 1 = s_0. A continuous function with the chords' slopes that meets the first knot meets
    # all.
    # Rounding: all hidden values lie in [0, 1] and all terms of the sum are positive, so nothing cancels: the error of
    # f is that of the hidden values, half an epsilon each, times c_j: at most about s_n epsilon.
    outer = torch.cat((torch.zeros(1, dtype=torch.float64), knots))
    turns = outer[2:] - outer[:-2]
    write_mlp_units(
        decoder,
        layer,
        read={ONE: torch.ones_like(turns), x: -knots[:-1]},
        bias=torch.zeros_like(turns),
        write={row: a * turns for row, (a, _) in outputs.items()},
        output_bias={row: a + b for row, (a, b) in outputs.items()},
    )


def write_absolute_position(decoder: Decoder, layer: int, length: int) -> None:
    """Weights by which a layer writes the position t = 1…length into row POSITION; ``<bos>`` stands at t = 1.

    It uses head 0 and MLP units 0…length-1 of the layer, and wants rows IS_BOS (1 for ``<bos>``, else 0) and
    POSITION (0) as the embeddings leave them. Kazemnejad et al. 2023, Theorem 1 and its proof in appendix C.
    """
    # Attention writes x = 1/t into row POSITION, which was 0.
    write_reciprocal(decoder, layer, POSITION)

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


class PositionInARow(StreamConstruction):
    """A construction whose claim is the position itself in row POSITION.

    Quantities:
        position: |row POSITION - t| after the last layer, in positions, t = 1 at ``<bos>``. Below 0.5 rounding to the
            nearest integer gives t.
        content: the largest change of rows ONE, IS_BOS and the content from the embedding to the end, claimed to be 0.
    """

    claim = "after the last layer row 2 of the stream holds the position t (1 at <bos>); the content is as embedded"
    layers, attention_layers, mlp_layers = 1, 1, 1

    def stream_errors(
        self,
        embedded: Float[Tensor, "pos d_model"],
        stream: Float[Tensor, "pos d_model"],
        t: Int[Tensor, "pos"],
        length: int,
    ) -> dict[str, Float[Tensor, "pos"]]:
        return {"position": (stream[:, POSITION] - t).abs(), "content": self.layout(length).change(embedded, stream)}


class AbsolutePosition(PositionInARow):
    """Kazemnejad et al. 2023, Theorem 1, as it is written: 1/t and t share a row, the MLP adds t - 1/t."""

    name = "absolute_position"
    source = "Kazemnejad et al. 2023, Theorem 1"
    # Measured: position 7e-10 in float64 at 4096; in float32 4e-5, 7e-4, 1e-2 and 4e-2 at 64, 256, 1024 and 2048.
    max_length: Mapping[torch.dtype, int] = {torch.float64: 4096, torch.float32: 2048}
    tolerance: Mapping[torch.dtype, Mapping[str, float]] = {
        torch.float64: {"position": 1e-8, "content": 0.0},
        torch.float32: {"position": 0.25, "content": 0.0},
    }

    def layout(self, length: int) -> Layout:
        return Layout()

    def width(self, length: int) -> int:
        return length

    def write_weights(self, decoder: Decoder, length: int, dtype: torch.dtype) -> None:
        write_embeddings(decoder)
        write_absolute_position(decoder, layer=0, length=length)


class ClosedForm(PositionInARow):
    """t = 1 + 2 Σ_{k=1}^{T-1} ReLU(1 - k x) at x = 1/t: Theorem 1 with an MLP in which nothing cancels.

    These are the chords (``write_chords``) with every integer a knot, c_k = (k+1) - (k-1) = 2. Directly:
    Σ_{k<=t} (1 - k/t) = t - (t+1)/2 = (t-1)/2.
    """

    name = "closed_form"
    source = "closed form of Kazemnejad et al. 2023, Theorem 1"
    # Measured: position 5e-11 in float64 at 16,384, 2e-2 in float32 there, 1/2 in bfloat16 at 95.
    max_length: Mapping[torch.dtype, int] = {torch.float64: 16384, torch.float32: 16384, torch.bfloat16: 64}
    tolerance: Mapping[torch.dtype, Mapping[str, float]] = {
        torch.float64: {"position": 1e-8, "content": 0.0},
        torch.float32: {"position": 0.05, "content": 0.0},
        torch.bfloat16: {"position": 0.49, "content": 0.0},
    }

    def layout(self, length: int) -> Layout:
        return Layout(reciprocal=1)

    def width(self, length: int) -> int:
        return max(1, length - 1)

    def write_weights(self, decoder: Decoder, length: int, dtype: torch.dtype) -> None:
        layout = self.layout(length)
        write_embeddings(decoder, layout)
        write_reciprocal(decoder, 0, layout.row("reciprocal"))
        knots = torch.arange(1, max(2, length) + 1, dtype=torch.float64)
        write_chords(decoder, 0, layout.row("reciprocal"), knots, {POSITION: (1.0, 0.0)})


CONSTRUCTIONS: dict[str, Construction] = {each.name: each for each in (AbsolutePosition(), ClosedForm())}
