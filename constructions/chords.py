"""Absolute position in √T units, and from it the exact integer and all of its bits, by units that round."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from constructions.absolute import PositionInARow, write_chords, write_reciprocal
from constructions.construction import Construction, StreamConstruction
from constructions.layout import POSITION, Layout, write_embeddings
from constructions.weights import write_units
from probe.models.decoder import Decoder

TOLERANCE = 0.25

# ReLU(y + M) rounds y to an integer, when M is so large that the dtype's numbers near y + M are the integers: float32
# from 2²³ to 2²⁴, float64 from 2⁵² to 2⁵³, bfloat16 from 128 to 256. The first two leave room for y < 0.
ROUNDING: dict[torch.dtype, float] = {torch.float64: 1.5 * 2.0**52, torch.float32: 1.5 * 2.0**23, torch.bfloat16: 128.0}


def chord_knots(length: int, tolerance: float = TOLERANCE) -> Float[Tensor, "knot"]:
    """Real knots 1 = s_0 < … < s_n, s_n >= length, whose chords exceed 1/x by at most 2 · ``tolerance``."""
    # In s = 1/x the chord between 1/a and 1/b, a < b, is a + b - ab x = a + b - ab/s. It exceeds s by
    #     a + b - ab/s - s = (√b - √a)² - (√(ab/s) - √s)²,
    # at most (√b - √a)², at s = √(ab). So knots at equal steps of √s, √s_{j+1} - √s_j = √(2 tolerance), will do, and
    # from 1 to T there are (√T - 1)/√(2 tolerance) steps: 511 for T = 131,072 and a quarter of a position.
    step = math.sqrt(2 * tolerance)
    n = max(1, math.ceil((math.sqrt(length) - 1) / step))
    return (1 + step * torch.arange(n + 1, dtype=torch.float64)) ** 2


def n_bits(length: int) -> int:
    """Bits of the numbers 0…length: ⌊t/2ʲ⌋ = 0 for j >= n_bits and t <= length."""
    return max(1, length).bit_length()


class Chords(PositionInARow):
    """Theorem 1 to a quarter of a position with √(2T) units: the chords between few knots, lowered by a quarter.

    The chords exceed t by 0…1/2 (``chord_knots``), so minus 1/4 they are within 1/4 of t. A half would not do:
    ``<bos>`` is a knot, and there the whole of it would be the error.
    """

    name = "chords"
    source = "square-root width for Kazemnejad et al. 2023, Theorem 1"
    # 1/4 is reached at every knot that is an integer. Rounding adds .09 in float32 at 131,072.
    max_length: Mapping[torch.dtype, int] = {torch.float64: 131072, torch.float32: 131072}
    tolerance: Mapping[torch.dtype, Mapping[str, float]] = {
        torch.float64: {"position": 0.25 + 1e-8, "content": 0.0},
        torch.float32: {"position": 0.4, "content": 0.0},
    }

    def layout(self, length: int) -> Layout:
        return Layout(reciprocal=1)

    def width(self, length: int) -> int:
        return len(chord_knots(length)) - 1

    def write_weights(self, decoder: Decoder, length: int, dtype: torch.dtype) -> None:
        layout = self.layout(length)
        write_embeddings(decoder, layout)
        x = layout.row("reciprocal")
        write_reciprocal(decoder, 0, x)
        write_chords(decoder, 0, x, chord_knots(length), {POSITION: (1.0, -TOLERANCE)})


def write_integers(
    decoder: Decoder,
    layer: int,
    length: int,
    dtype: torch.dtype,
    x: int,
    scratch: range,
    bits: dict[int, range],
    position: int | None = None,
) -> None:
    """Weights by which two layers, ``layer`` and ``layer + 1``, turn 1/t in row ``x`` into exact integers.

    Args:
        length: the positions t = 1…length that are wanted.
        dtype: the one that the decoder will run in: float32 or float64.
        x: the row that holds 1/t.
        scratch: as many rows as ``bits`` has, one after the other and at least one for each shift, which hold 0.
        bits: for each shift k the rows for the bits of t + k, the lowest first, so many that t + k < 2^(their number);
            none if only ``position`` is wanted. What they hold where t + k < 0 is not claimed.
        position: the row for t itself, the shift 0 being one of ``bits``.
    """
    # First MLP. t̂ = the chords minus 1/4 is within 1/2 of t, rounding included. Row j of the scratch gets
    #     y_j = (t̂ + k)/2ʲ - 1/2 + 2^-(j+1).
    # With t + k = 2ʲ m + r, 0 <= r < 2ʲ, and t̂ = t:  y_j - m = r/2ʲ - 1/2 + 2^-(j+1), which lies within
    # ±(1/2 - 2^-(j+1)). So an error of t̂ below 1/2, which y_j holds divided by 2ʲ, leaves |y_j - m| < 1/2.
    rows, first = {}, 0
    for k, targets in bits.items():
        rows[k] = scratch[first : first + max(1, len(targets))]
        first += len(rows[k])
    outputs = {
        row: (2.0**-j, (k - TOLERANCE) * 2.0**-j - 0.5 + 2.0 ** -(j + 1)) for k in bits for j, row in enumerate(rows[k])
    }
    write_chords(decoder, layer, x, chord_knots(length), outputs)

    # Second MLP. Unit j computes ReLU(y_j + M) and stores it rounded to an integer: M + m_j, m_j = ⌊(t + k)/2ʲ⌋. It
    # must have this one non-zero input: y_j is exact in the product with 1, and the sum with the bias M is rounded
    # once.
    # Then bit j is m_j - 2 m_{j+1} = (M + m_j) - 2 (M + m_{j+1}) + M, the highest m_j - 0 = (M + m_j) - M, and
    # t = (M + m_0) - M for k = 0. All partial sums are integers below 2²⁴ (2⁵³ in float64) and so exact, if j+1 is
    # summed before j, or the bias M last, but not M + (M + m_j) first: the units stand in the order of falling j.
    M = ROUNDING[dtype]
    units, output_bias = [], {}
    for k, targets in bits.items():
        for j in reversed(range(len(rows[k]))):
            writes = {}
            if j < len(targets):
                writes[targets[j]] = 1.0
                output_bias[targets[j]] = M if j + 1 < len(targets) else -M
            if j > 0:
                writes[targets[j - 1]] = -2.0
            if j == 0 and k == 0 and position is not None:
                writes[position] = 1.0
                output_bias[position] = -M
            units.append(({rows[k][j]: 1.0}, M, writes))
    write_units(decoder, layer + 1, units, output_bias)


class ExactPosition(StreamConstruction):
    """The integer t and every bit of it, exactly: chords, then units that round. One attention and two MLP layers.

    Not the least error is allowed.

    Quantities:
        position: |row POSITION - t|, in positions.
        bits: the largest |row - bit j of t| over j = 0…n_bits-1.
        content: the largest change of rows ONE, IS_BOS and the content.
    """

    name = "exact_position"
    claim = "after layer 1 row 2 of the stream is the integer t and further rows its bits, without any error"
    source = "rounding units on the square-root width"
    layers, attention_layers, mlp_layers = 2, 1, 2
    dtype_specific = True
    max_length: Mapping[torch.dtype, int] = {torch.float64: 131072, torch.float32: 131072}
    tolerance: Mapping[torch.dtype, Mapping[str, float]] = {
        dtype: {"position": 0.0, "bits": 0.0, "content": 0.0} for dtype in (torch.float64, torch.float32)
    }

    def layout(self, length: int) -> Layout:
        return Layout(reciprocal=1, scratch=n_bits(length), bits=n_bits(length))

    def width(self, length: int) -> int:
        return max(len(chord_knots(length)) - 1, n_bits(length))

    def write_weights(self, decoder: Decoder, length: int, dtype: torch.dtype) -> None:
        layout = self.layout(length)
        write_embeddings(decoder, layout)
        x = layout.row("reciprocal")
        write_reciprocal(decoder, 0, x)
        write_integers(decoder, 0, length, dtype, x, layout["scratch"], {0: layout["bits"]}, position=POSITION)

    def stream_errors(
        self,
        embedded: Float[Tensor, "pos d_model"],
        stream: Float[Tensor, "pos d_model"],
        t: Int[Tensor, "pos"],
        length: int,
    ) -> dict[str, Float[Tensor, "pos"]]:
        layout = self.layout(length)
        bits = (t[:, None] >> torch.arange(n_bits(length))) & 1
        return {
            "position": (stream[:, POSITION] - t).abs(),
            "bits": (stream[:, list(layout["bits"])] - bits).abs().amax(-1),
            "content": layout.change(embedded, stream),
        }


CONSTRUCTIONS: dict[str, Construction] = {each.name: each for each in (Chords(), ExactPosition())}
