"""Purely positional heads out of no position encoding: self, previous token, k back, first token, sliding window."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from constructions.absolute import write_reciprocal
from constructions.chords import chord_knots, n_bits, write_integers
from constructions.construction import Construction
from constructions.layout import D_VOCAB, IS_BOS, ONE, Layout, write_embeddings
from constructions.observing import observe
from constructions.odometer import Odometer
from constructions.weights import Unit, write_head, write_units
from probe.models.decoder import Decoder, DecoderConfig

BACK = 5  # the distance of the k-back head
WINDOW_BITS = 3
WINDOW = 2**WINDOW_BITS
SHIFTS = (0, -1, -BACK, WINDOW)
# The score of a key whose code differs in one bit is 2 MATCH below that of the right one: e^-32 of its weight.
MATCH = 16.0

SELF, PREVIOUS, KBACK, FIRST, LOCAL = range(5)


class PositionalHeads(Construction, ABC):
    """Five heads in the last layer that look at a position whatever stands there.

    The layers before write the bits of t, t - 1, t - BACK and t + WINDOW into the stream (``write_bits``). What this
    class adds is their use. Values are bits of the key's position, so that z tells where the head looked:

    Quantities, read off z alone, so that they can be had from the fused kernel at every position of any length. z is a
    mean of the values, which are 0 or 1: where no value at the target is 1, z is the weight of wrong keys (and small
    numbers keep their digits in any dtype, as 1 - small would not).
        self, previous, back, first: an upper bound of 1 - (mass on the target). Values are each bit of the key's
            position and its complement; what is summed are the channels that are 0 at the target. Every other key
            differs in one bit or more, so the sum is Σ_i pattern(t, i) Hamming(i, target) >= 1 - pattern(t, target).
        window: an upper bound of 1 - (mass on the last n = min(WINDOW, t) keys): the channels that are 0 in the whole
            window, among the key's residue modulo 2 WINDOW (one of 2 WINDOW channels is 1), and the bits of its block
            of 2 WINDOW and their complements. A key outside the window has another residue or another block.
        values: the largest |bit + complement - 1| over the pairs of channels: that there are values to be read at all.
        evenness: the largest |z_r - 1/n| over the residues in the window: how unevenly it is looked at.
    Previous and back are claimed where there is such a key, t > 1 and t > BACK.
    """

    source = "positional heads from the bits of t; against Barbero et al. 2025, Proposition 5.2, which is for one layer"
    claim = (
        f"five heads of the last layer attend to the token itself, the previous one, {BACK} back, the first, and "
        f"evenly to the last {WINDOW}"
    )
    #: What is claimed of each head; "evenness" and "values" come beside them.
    quantities: ClassVar = ("self", "previous", "back", "first", "window")
    n_heads: ClassVar = 5  #: of the last layer

    @abstractmethod
    def sizes(self, length: int) -> dict[str, int]:
        """The rows that ``write_bits`` needs for itself."""

    @abstractmethod
    def count(self, length: int) -> int:
        """Bits of a position."""

    @abstractmethod
    def write_bits(self, decoder: Decoder, layout: Layout, length: int, dtype: torch.dtype) -> None:
        """Write bit j of t + k into row ``layout[f"bits {k}"][j]``, 0 or 1 exactly, for each k in SHIFTS, in the layers
        before the last two."""

    @abstractmethod
    def least_width(self, length: int) -> int:
        """MLP units that ``write_bits`` wants."""

    @abstractmethod
    def least_d_head(self, length: int) -> int:
        """Dimensions of a head that ``write_bits`` wants."""

    def layout(self, length: int) -> Layout:
        """The rows of the stream: those of ``sizes``, the bits of each shifted position, the code of the window."""
        count = self.count(length)
        high = count - WINDOW_BITS - 1
        bits = {f"bits {k}": count for k in SHIFTS}
        return Layout(**self.sizes(length), **bits, residue=2 * WINDOW, aligned=high, shifted=high)

    def config(self, length: int) -> DecoderConfig:
        layout, count = self.layout(length), self.count(length)
        local = 2 * WINDOW + 4 * len(layout["aligned"])
        return DecoderConfig(
            d_vocab=D_VOCAB,
            n_ctx=length,
            n_layers=self.layers,
            d_model=layout.d_model,
            n_heads=self.n_heads,
            d_head=max(2 * count, local, self.least_d_head(length)),
            d_mlp=max(self.least_width(length), 2 * WINDOW + 2 * len(layout["aligned"])),
            activation="relu",
            normalization="none",
            encoding="none",
            bias=True,
        )

    def write_weights(self, decoder: Decoder, length: int, dtype: torch.dtype) -> None:
        layout = self.layout(length)
        write_embeddings(decoder, layout)
        self.write_bits(decoder, layout, length, dtype)
        last = self.layers - 1
        self._write_window_code(decoder, last - 1, layout)
        scale = MATCH / decoder.config.score_scale

        # Self, previous, back: with signs a = 2 bit - 1 the score is MATCH Σ_j a_j(t + k) a_j(i), which is
        # MATCH (count - 2 Hamming(t + k, i)): largest at i = t + k, and 2 MATCH less at the nearest others, of which
        # there are at most C(count, h) at Hamming distance h. So 1 - mass <= (1 + e^(-2 MATCH))^count - 1 < 1e-12.
        bits = layout["bits 0"]
        for head, k in ((SELF, 0), (PREVIOUS, -1), (KBACK, -BACK)):
            for j, (query, key) in enumerate(zip(layout[f"bits {k}"], bits, strict=True)):
                write_head(
                    decoder,
                    last,
                    head,
                    query={(query, j): 2 * scale, (ONE, j): -scale},
                    key={(key, j): 2.0, (ONE, j): -1.0},
                )
        # First: the score is 4 MATCH on <bos>, else 0: 1 - mass <= T e^-64.
        write_head(decoder, last, FIRST, query={(ONE, 0): 4 * scale}, key={(IS_BOS, 0): 1.0})
        for head in (SELF, PREVIOUS, KBACK, FIRST):
            write_head(decoder, last, head, value=_bits_and_complements(bits))
        self._write_window(decoder, last, layout, scale)

    def _write_window_code(self, decoder: Decoder, layer: int, layout: Layout) -> None:
        # Let W = WINDOW, r = t mod 2W. In the MLP before the heads:
        #   residue r': ReLU(Σ_{j<=WINDOW_BITS} ±bit_j - (ones of r' - 1)), + where r' has a 1: it is 1 iff all bits
        #     agree, as each that does not takes 1 off; else 0.
        #   aligned j: late · bit_j(t), shifted j: (1 - late) · bit_j(t + W), where late = bit WINDOW_BITS of t, which
        #     says r >= W, and j > WINDOW_BITS; a product of bits b c is ReLU(b + c - 1).
        bits, moved = layout["bits 0"], layout[f"bits {WINDOW}"]
        late = bits[WINDOW_BITS]
        units = []
        for residue, row in enumerate(layout["residue"]):
            signs = {bits[j]: 1.0 if residue >> j & 1 else -1.0 for j in range(WINDOW_BITS + 1)}
            units.append((signs, 1.0 - residue.bit_count(), {row: 1.0}))
        for j, (aligned, shifted) in enumerate(zip(layout["aligned"], layout["shifted"], strict=True)):
            units.append(({late: 1.0, bits[WINDOW_BITS + 1 + j]: 1.0}, -1.0, {aligned: 1.0}))
            units.append(({late: -1.0, moved[WINDOW_BITS + 1 + j]: 1.0}, 0.0, {shifted: 1.0}))
        write_units(decoder, layer, units)

    def _write_window(self, decoder: Decoder, layer: int, layout: Layout, scale: float) -> None:
        # If r >= W the window t - W + 1…t lies in the block ⌊t/2W⌋ of 2W positions; if not, then in the block
        # ⌊(t + W)/2W⌋ of the blocks shifted by W. The query carries the signs of that one block number, and 0 in place
        # of the other: aligned dims late (2 bit - 1) = 2 aligned - late, shifted ones 2 shifted - (1 - late). A key
        # carries the signs of both of its block numbers. These dimensions add MATCH (high - 2 Hamming).
        # A query further allows the residues t - W + 1…t modulo 2W, and the key has one: MATCH · 2 [allowed]. All keys
        # of the block with an allowed residue, and no others, have the largest score, MATCH (high + 2); the next is
        # 2 MATCH below. Those in the future are masked, and there the window is cut at <bos>: for t < W it is 1…t,
        # as position 0, in the same shifted block, does not exist.
        bits, moved = layout["bits 0"], layout[f"bits {WINDOW}"]
        late = bits[WINDOW_BITS]
        query: dict[tuple[int, int], float] = {}
        key: dict[tuple[int, int], float] = {}
        value: dict[tuple[int, int], float] = {}
        for r, row in enumerate(layout["residue"]):
            query |= {(layout["residue"][(r + back) % (2 * WINDOW)], r): 2 * scale for back in range(WINDOW)}
            key[row, r] = value[row, r] = 1.0
        high = len(layout["aligned"])
        for j in range(high):
            a, b, at = 2 * WINDOW + j, 2 * WINDOW + high + j, WINDOW_BITS + 1 + j
            query |= {(layout["aligned"][j], a): 2 * scale, (late, a): -scale}
            query |= {(layout["shifted"][j], b): 2 * scale, (ONE, b): -scale, (late, b): scale}
            for dimension, row in ((a, bits[at]), (b, moved[at])):
                key |= {(row, dimension): 2.0, (ONE, dimension): -1.0}
        value |= _bits_and_complements(bits[WINDOW_BITS + 1 :], first=2 * WINDOW)
        value |= _bits_and_complements(moved[WINDOW_BITS + 1 :], first=2 * WINDOW + 2 * high)
        write_head(decoder, layer, LOCAL, query=query, key=key, value=value)

    def errors(
        self, decoder: Decoder, tokens: Int[Tensor, "1 pos"], attention: str
    ) -> tuple[Int[Tensor, "looked_at"], dict[str, Float[Tensor, "looked_at"]]]:
        site = f"blocks.{self.layers - 1}.attn.hook_z"
        z = observe(decoder, tokens, (site,), attention=attention)[site][0]
        t = torch.arange(1, tokens.shape[1] + 1)
        count = self.count(decoder.config.n_ctx)
        targets = {"self": t, "previous": t - 1, "back": t - BACK, "first": torch.ones_like(t)}
        errors = {}
        for head, (quantity, target) in enumerate(targets.items()):
            errors[quantity] = _wrong_bits(z[:, head], target, count).where(target >= 1, 0)
        errors["window"], errors["evenness"] = _window_errors(z[:, LOCAL], t, count)
        pairs = [
            z[:, :LOCAL, : 2 * count].flatten(1),
            z[:, LOCAL, 2 * WINDOW : 2 * WINDOW + 4 * (count - WINDOW_BITS - 1)],
        ]
        sums = torch.cat(pairs, dim=-1).unflatten(-1, (-1, 2)).sum(-1)
        errors["values"] = (sums - 1).abs().amax(-1)
        return t, errors


def _bits_and_complements(bits: range, first: int = 0) -> dict[tuple[int, int], float]:
    """Entries of W_V: channel 2j is bit j, channel 2j + 1 its complement 1 - bit j."""
    entries: dict[tuple[int, int], float] = {}
    for j, row in enumerate(bits):
        entries |= {(row, first + 2 * j): 1.0, (ONE, first + 2 * j + 1): 1.0, (row, first + 2 * j + 1): -1.0}
    return entries


def _wrong_bits(z: Float[Tensor, "pos channel"], target: Int[Tensor, "pos"], count: int) -> Float[Tensor, "pos"]:
    """The sum of the channels that are 0 at the target: bits that it has not, complements of those that it has."""
    channels = z[:, : 2 * count].unflatten(-1, (count, 2))
    has = (target[:, None] >> torch.arange(count)) & 1
    return torch.where(has == 1, channels[..., 1], channels[..., 0]).sum(-1)


def _window_errors(
    z: Float[Tensor, "pos d_head"], t: Int[Tensor, "pos"], count: int
) -> tuple[Float[Tensor, "pos"], Float[Tensor, "pos"]]:
    back = torch.arange(WINDOW)
    residues = torch.nn.functional.one_hot((t[:, None] - back) % (2 * WINDOW), 2 * WINDOW)
    within = (residues * (t[:, None] > back)[..., None]).sum(1)
    read = z[:, : 2 * WINDOW]
    outside = read.where(within == 0, 0).sum(-1)
    uneven = (read - 1 / t.clamp(max=WINDOW).to(read)[:, None]).abs().where(within == 1, 0).amax(-1)
    late = t % (2 * WINDOW) >= WINDOW
    high = count - WINDOW_BITS - 1
    for first, block, mine in ((0, t, late), (2 * high, t + WINDOW, ~late)):
        wrong = _wrong_bits(z[:, 2 * WINDOW + first :], block >> (WINDOW_BITS + 1), high)
        outside += wrong.where(mine, 0)
    return outside, uneven


class HeadsFromChords(PositionalHeads):
    """The bits from the rounded chords (``constructions.chords``), in float32 and float64."""

    name = "positional_heads"
    layers, attention_layers, mlp_layers = 4, 2, 3
    dtype_specific = True
    max_length: Mapping[torch.dtype, int] = {torch.float64: 65535, torch.float32: 65535}
    tolerance: Mapping[torch.dtype, Mapping[str, float]] = {
        dtype: {**dict.fromkeys(PositionalHeads.quantities, most), "evenness": most, "values": most}
        for dtype, most in ((torch.float64, 1e-7), (torch.float32, 1e-5))
    }

    def sizes(self, length: int) -> dict[str, int]:
        return {"reciprocal": 1, "scratch": len(SHIFTS) * self.count(length)}

    def count(self, length: int) -> int:
        return n_bits(length + WINDOW)

    def write_bits(self, decoder: Decoder, layout: Layout, length: int, dtype: torch.dtype) -> None:
        x = layout.row("reciprocal")
        write_reciprocal(decoder, 0, x)
        bits = {k: layout[f"bits {k}"] for k in SHIFTS}
        write_integers(decoder, 0, length + WINDOW, dtype, x, layout["scratch"], bits)

    def least_width(self, length: int) -> int:
        return max(len(chord_knots(length + WINDOW)) - 1, len(SHIFTS) * self.count(length))

    def least_d_head(self, length: int) -> int:
        return 1


class HeadsFromOdometer(PositionalHeads):
    """The bits from the odometer's digits, in integers that bfloat16 holds."""

    name = "positional_heads_odometer"
    layers, attention_layers, mlp_layers = 7, 3, 6
    dtype_specific = True
    odometer = Odometer("digits", levels=[(64, 127)])
    max_length: Mapping[torch.dtype, int] = {dtype: 8193 for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    # 1/3 is not a bfloat16: evenness is as fine as the dtype.
    tolerance: Mapping[torch.dtype, Mapping[str, float]] = {
        dtype: {**dict.fromkeys(PositionalHeads.quantities, 1e-6), "evenness": most, "values": most}
        for dtype, most in ((torch.float64, 1e-7), (torch.float32, 1e-5), (torch.bfloat16, 1e-2))
    }

    def sizes(self, length: int) -> dict[str, int]:
        return self.odometer.sizes() | {"upper": len(SHIFTS), "lower": len(SHIFTS)}

    def count(self, length: int) -> int:
        return n_bits(self.odometer.span + WINDOW)

    def write_bits(self, decoder: Decoder, layout: Layout, length: int, dtype: torch.dtype) -> None:
        self.odometer.write(decoder, layout, dtype)
        layer, block = self.odometer.layers, self.odometer.levels[0][0]
        digit, low = layout.row("digits"), layout.row("low")
        # The odometer leaves t = 64 digit + low, 1 <= low <= 65. So t + k = 64 (digit + m) + (low + k - 64 m), and
        # m = ⌊(low + k)/64⌋ makes the second term 0…63. As -64 <= low + k < 128, m = [low + k >= 0] + [low + k >= 64]
        # - 1, and a step at an integer is a difference of two ReLUs: [s >= c] = ReLU(s - c + 1) - ReLU(s - c).
        units: list[Unit] = [({digit: 1.0}, 0.0, {upper: 1.0 for upper in layout["upper"]})]
        output_bias: dict[int, float] = {}
        for k, upper, lower in zip(SHIFTS, layout["upper"], layout["lower"], strict=True):
            units.append(({low: 1.0}, 0.0, {lower: 1.0}))
            for c in (0, block):
                for offset, sign in ((1.0, 1.0), (0.0, -1.0)):
                    units.append(({low: 1.0}, k - c + offset, {upper: sign, lower: -block * sign}))
            output_bias |= {upper: -1.0, lower: float(k + block)}
        write_units(decoder, layer, units, output_bias)
        # Any g on the integers 0…V is g(0) + Σ_{c<V} d_c ReLU(v - c), d_0 = g(1) - g(0), and else
        # d_c = g(c+1) - 2 g(c) + g(c-1): the slope turns at each integer as g does. Here g is each bit of v; all hidden
        # values are integers up to 128, so exact in bfloat16, and their sums are exact in float32.
        units, output_bias = [], {}
        n_low = block.bit_length() - 1
        largest = (self.odometer.span + WINDOW) // block
        for which, k in enumerate(SHIFTS):
            rows = layout[f"bits {k}"]
            for source, targets, most in (
                (layout["lower"][which], rows[:n_low], block - 1),
                (layout["upper"][which], rows[n_low:], largest),
            ):
                for c in range(most):
                    turns = {}
                    for j, row in enumerate(targets):
                        before, here, after = (v >> j & 1 for v in (c - 1, c, c + 1)) if c else (0, 0, 1 >> j & 1)
                        turns[row] = float(after - 2 * here + before)
                    units.append(({source: 1.0}, -float(c), turns))
        write_units(decoder, layer + 1, units, output_bias)

    def least_width(self, length: int) -> int:
        block = self.odometer.levels[0][0]
        per_shift = block - 1 + (self.odometer.span + WINDOW) // block
        return max(self.odometer.width(length), len(SHIFTS) * per_shift)

    def least_d_head(self, length: int) -> int:
        return self.odometer.d_head(length)


CONSTRUCTIONS: dict[str, Construction] = {each.name: each for each in (HeadsFromChords(), HeadsFromOdometer())}
