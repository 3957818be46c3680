"""Absolute position in bfloat16: digits, each counted by a head of its own inside the block that the last one found."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from constructions.chords import ROUNDING
from constructions.construction import StreamConstruction
from constructions.layout import IS_BOS, ONE, Layout, write_embeddings
from constructions.weights import write_head, write_units
from probe.models.decoder import Decoder

# Larger than any other term of the unit it closes, smaller than what bfloat16 can square.
CLOSED = 2.0**60
# Multiplies queries and keys of the block match: scores are 0 in a block and below -10⁴ outside.
MATCH = 64.0


class Odometer(StreamConstruction):
    """Position as digits, t = Σ_l size_l · digit_l + low, from weights and activations that are all bfloat16.

    Write n = t - 1, so that n = 0 at ``<bos>``. A level (A, J) divides what the level above left, a block of A (J + 1)
    tokens, into J + 1 blocks of A: its digit counts the thresholds A, 2A, …, JA that lie below n. The last level's
    blocks are then counted token by token. bfloat16 tells no integers above 256 apart, so the digits stay in rows of
    their own: that is what is claimed, and from them t follows in integers.

    Quantities:
        position: |Σ_l size_l · digit_l + low - t|, in positions, summed in float64 by the check.
        digits: the largest |row - digit| over the levels and the low digit, low = 2…A+1 (1 at ``<bos>``).
        content: the largest change of rows ONE, IS_BOS and the content.
    """

    source = "nested counting in blocks, after Kazemnejad et al. 2023, Theorem 1"
    dtype_specific = True

    def __init__(self, name: str, levels: Sequence[tuple[int, int]]):
        """Levels (A, J) from the outermost: blocks of A tokens each, J thresholds between them."""
        self.name, self.levels = name, tuple(levels)
        self.attention_layers = len(self.levels) + 1
        self.layers = self.mlp_layers = len(self.levels) + 2
        low = self.levels[-1][0]
        self.claim = (
            f"after layer {self.layers - 1} {len(self.levels)} digits and a low digit of 1…{low + 1} in rows of the "
            f"stream make up t exactly"
        )
        self.span = self.levels[0][0] * (self.levels[0][1] + 1) + 1
        self.max_length = {dtype: self.span for dtype in (torch.float64, torch.float32, torch.bfloat16)}
        self.tolerance = {dtype: {"position": 0.0, "digits": 0.0, "content": 0.0} for dtype in self.max_length}

    def sizes(self) -> dict[str, int]:
        """The groups of rows that ``write`` needs."""
        sizes = {"not_bos": 1}
        for level, (_, J) in enumerate(self.levels):
            sizes |= {f"crossing {level}": J, f"reciprocal {level}": 1, f"until {level}": J, f"after {level}": J}
        return sizes | {"reciprocal low": 1, "digits": len(self.levels), "near low": 1, "low": 1}

    def layout(self, length: int) -> Layout:
        return Layout(**self.sizes())

    def width(self, length: int) -> int:
        return max(2 * max(J for _, J in self.levels), sum(J for _, J in self.levels) + self.levels[-1][0])

    def d_head(self, length: int) -> int:
        """A channel for each threshold of a level and one more, and a dimension for each threshold that is matched."""
        return max(*(J + 1 for _, J in self.levels), sum(J for _, J in self.levels))

    def write_weights(self, decoder: Decoder, length: int, dtype: torch.dtype) -> None:
        layout = self.layout(length)
        write_embeddings(decoder, layout)
        self.write(decoder, layout, dtype)

    def write(self, decoder: Decoder, layout: Layout, dtype: torch.dtype) -> None:
        """Weights of the layers 0…layers-1, in head 0 and in the rows of ``sizes``."""
        for level in range(len(self.levels)):
            self._write_match(decoder, layout, level)
            self._write_thresholds(decoder, layout, level)
        self._write_low(decoder, layout, dtype)

    def _write_match(self, decoder: Decoder, layout: Layout, level: int) -> None:
        """The head of layer ``level`` attends uniformly to <bos> and, of the visible keys, to those whose digits above
        ``level`` are the query's."""
        # A level above has, at each token and for each threshold A_j, a number u_j > 0 iff n <= A_j, n > 0 (else 0) and
        # w_j > 0 iff n > A_j (else 0); n counts from the start of that level's block. The score is
        #     -MATCH² score_scale Σ_j w_j(query) u_j(key)
        # over the thresholds of all levels above. A term is not 0 iff the key is on this side of the threshold and the
        # query beyond it. In the query's own block no threshold lies between, so the score is exactly 0; on <bos> all
        # u_j are 0. A visible key in an earlier block has a threshold between it and the query, both numbers are then
        # at least 1 (_write_thresholds), and the score is below -MATCH²/√d_head < -200: exp gives 0 beside exp(0) = 1,
        # exactly so in float32 and below, in which bfloat16 attention computes its exponentials. (Digits of the
        # outer levels are compared first: with equal outer blocks the inner numbers count from the same start; with
        # different ones a term of the outer level is already there, and others only add to it.)
        # At level 0 there is nothing to match, W_Q = W_K = 0, and the head is uniform over all visible keys.
        rows = [
            pair
            for above in range(level)
            for pair in zip(layout[f"after {above}"], layout[f"until {above}"], strict=True)
        ]
        for j, (after, until) in enumerate(rows):
            write_head(decoder, level, 0, query={(after, j): MATCH}, key={(until, j): -MATCH})

    def _write_thresholds(self, decoder: Decoder, layout: Layout, level: int) -> None:
        # The head attends to <bos> and the n tokens of the block up to the query, n = 0 at <bos>, each with weight
        # 1/(n+1). Channel j of its value is A_j on <bos> and -1 elsewhere, so
        #     z_j = (A_j - n)/(n + 1),
        # whose sign says on which side of A_j = A (j+1) the query stands. Every A_j is a power of two times an integer
        # below 2⁸, so a bfloat16; the sum A_j - n is formed in float32 from integers, the quotient rounded once: it is
        # 0 exactly at n = A_j and has the right sign elsewhere. One more channel, 1 on <bos>, gives x = 1/(n+1).
        A, J = self.levels[level]
        not_bos, crossing, x = layout.row("not_bos"), layout[f"crossing {level}"], layout.row(f"reciprocal {level}")
        for j in range(J):
            write_head(
                decoder,
                level,
                0,
                value={(IS_BOS, j): A * (j + 1.0), (not_bos, j): -1.0},
                output={(j, crossing[j]): 1.0},
            )
        write_head(decoder, level, 0, value={(IS_BOS, J): 1.0}, output={(J, x): 1.0})
        # MLP: u_j = ReLU(G (z_j + x/2) - CLOSED [bos]), w_j = ReLU(-G (z_j + x/2)). As z_j + x/2 = (A_j - n +
        # 1/2)/(n+1) and |z_j| >= x where it is not 0, the half moves the crossing between n = A_j and A_j + 1 whatever
        # the roundings: u_j > 0 iff n <= A_j, w_j > 0 iff n > A_j. Both are at least G x/2 (less rounding) where they
        # are not 0, and G/2 >= 2 (n + 1) makes that at least 1. CLOSED, above G A_j, keeps u_j at 0 on <bos>; w_j is 0
        # there by itself.
        span = self.span if level == 0 else self.levels[level - 1][0] + 1
        G = 2.0 ** (4 * span - 1).bit_length()
        units = []
        for z, until, after in zip(crossing, layout[f"until {level}"], layout[f"after {level}"], strict=True):
            units += [({z: G, x: G / 2, IS_BOS: -CLOSED}, 0.0, {until: 1.0}), ({z: -G, x: -G / 2}, 0.0, {after: 1.0})]
        write_units(decoder, level, units)

    def _write_low(self, decoder: Decoder, layout: Layout, dtype: torch.dtype) -> None:
        layer = len(self.levels)
        self._write_match(decoder, layout, layer)
        x, near, low = layout.row("reciprocal low"), layout.row("near low"), layout.row("low")
        # The head attends to <bos> and the l + 1 tokens of the smallest block up to the query, and its value is 1 on
        # <bos>: x = 1/(l + 2), 1 at <bos>. The closed form 1 + 2 Σ_{k=1}^A ReLU(1 - k x) turns it into l + 2 <= A + 1,
        # up to bfloat16's error, below 1/2 for A = 64 (not for 128).
        write_head(decoder, layer, 0, value={(IS_BOS, 0): 1.0}, output={(0, x): 1.0})
        units = [({ONE: 1.0, x: -float(k)}, 0.0, {near: 2.0}) for k in range(1, self.levels[-1][0] + 1)]
        # Digit: Σ_j ReLU(1 - u_j - [bos]) counts the thresholds with u_j = 0, those below n: where u_j > 0 it is >= 1.
        for level, digit in enumerate(layout["digits"]):
            units += [({ONE: 1.0, IS_BOS: -1.0, u: -1.0}, 0.0, {digit: 1.0}) for u in layout[f"until {level}"]]
        write_units(decoder, layer, units, {near: 1.0})
        # One more MLP rounds l + 2 to the integer: ReLU(y + M) - M, with one non-zero input (see chords.ROUNDING; in
        # bfloat16 y + 128 lies in [129, 193], where the spacing is 1).
        M = ROUNDING[dtype]
        write_units(decoder, layer + 1, [({near: 1.0}, M, {low: 1.0})], {low: -M})

    def stream_errors(
        self,
        embedded: Float[Tensor, "pos d_model"],
        stream: Float[Tensor, "pos d_model"],
        t: Int[Tensor, "pos"],
        length: int,
    ) -> dict[str, Float[Tensor, "pos"]]:
        layout = self.layout(length)
        n = t - 1
        rest = n - 1  # from the first token of the block, counted from 0; n = 0, <bos>, is in block 0
        wanted, error, position = [], [], torch.zeros(len(t), dtype=torch.float64)
        for level, (A, _) in enumerate(self.levels):
            wanted.append(torch.where(n > 0, rest // A, 0))
            rest = torch.where(n > 0, rest % A, -1)
            position += A * stream[:, layout["digits"][level]]
            error.append((stream[:, layout["digits"][level]] - wanted[-1]).abs())
        low = stream[:, layout.row("low")]
        error.append((low - (rest + 2)).abs())
        return {
            "position": (position + low - t).abs(),
            "digits": torch.stack(error).amax(0),
            "content": layout.change(embedded, stream),
        }


CONSTRUCTIONS: dict[str, Odometer] = {
    "odometer_two": Odometer("odometer_two", levels=[(64, 127)]),
    "odometer_three": Odometer("odometer_three", levels=[(2048, 63), (64, 31)]),
}
