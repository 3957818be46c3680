"""Absolute position by Newton's division: swiglu units multiply, so log T of them and a few layers compute 1/x."""

import math
from collections.abc import Mapping

import torch

from constructions.absolute import PositionInARow, write_reciprocal
from constructions.construction import Construction
from constructions.layout import ONE, POSITION, Layout, write_embeddings
from constructions.weights import write_mlp_units
from probe.errors import ProbeError
from probe.models.decoder import Decoder

# An octave's chord of 1/x lies between 1 and 9/8 of it; 16/17 of the chord is within 1/17 of it on either side.
CENTRE = 16 / 17


class Newton(PositionInARow):
    """y ← y (2 - x y) as y ← y + y e, e ← e + e (e - 1), where e = 1 - x y: one swiglu layer a step.

    Newton's step takes the relative error e of y to e²: y' = y (1 + e) and 1 - x y' = 1 - (1 - e)(1 + e) = e². Carrying
    e in the stream beside y (Goldschmidt's division) makes both updates products of two rows, which a swiglu layer
    computes exactly; Newton's own form is a product of three.
    """

    name = "newton"
    source = "Newton's division by swiglu products, for Kazemnejad et al. 2023, Theorem 1"
    activation = "swiglu"
    attention_layers = 1
    max_length: Mapping[torch.dtype, int] = {torch.float64: 131072, torch.float32: 131072}
    # Three steps leave t · 17^-8 of t, 2e-5 at 131,072; the rest is rounding, which no step takes back:
    # measured .03 in float32 at 131,072.
    tolerance: Mapping[torch.dtype, Mapping[str, float]] = {
        torch.float64: {"position": 1e-4, "content": 0.0},
        torch.float32: {"position": 0.25, "content": 0.0},
    }

    def __init__(self, steps: int = 3):
        """Raises:
        ProbeError: for fewer than one step.
        """
        if steps < 1:
            raise ProbeError(f"steps must be at least 1, got {steps}")
        self.steps = steps
        self.layers = self.mlp_layers = 1 + steps

    def layout(self, length: int) -> Layout:
        return Layout(reciprocal=1, error=1)

    def _octaves(self, length: int) -> int:
        return max(1, math.ceil(math.log2(length)))

    def width(self, length: int) -> int:
        return max(4, 2 * self._octaves(length) + 1)

    def write_weights(self, decoder: Decoder, length: int, dtype: torch.dtype) -> None:
        layout = self.layout(length)
        write_embeddings(decoder, layout)
        x, e, y = layout.row("reciprocal"), layout.row("error"), POSITION
        write_reciprocal(decoder, 0, x)

        # The start, y = 16/17 (1 + Σ_j c_j g_j): the chords of write_chords with the knots s_j = 2ʲ, j = 0…n, but with
        # g_j = silu(S (1 - s_j x))/S in place of ReLU(1 - s_j x), which differs from it by at most .28/S. What the
        # start must have is |e| about 1/17; what counts is that e is 1 - x y for this very y. It is, whatever g_j:
        # each gate stands twice, once multiplied by 1 and written into y, once multiplied by x and written into e:
        #     1 - x y = 1 - 16/17 x - Σ_j 16/17 c_j g_j x.
        # The term in x alone is a unit whose gate is silu(S) = S (S >= 64, where the sigmoid is 1), multiplied by x.
        n = self._octaves(length)
        knots = 2.0 ** torch.arange(n + 1, dtype=torch.float64)
        outer = torch.cat((torch.zeros(1, dtype=torch.float64), knots))
        turns = CENTRE * (outer[2:] - outer[:-2])
        S = 64.0 * 2**n
        zero, one = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        alone, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        write_mlp_units(
            decoder,
            0,
            gate={
                ONE: torch.cat((S * one, S * one, S * alone)),
                x: torch.cat((-S * knots[:-1], -S * knots[:-1], none)),
            },
            read={ONE: torch.cat((one, zero, none)), x: torch.cat((zero, one, alone))},
            bias=torch.zeros(2 * n + 1, dtype=torch.float64),
            write={
                y: torch.cat((turns / S, zero, none)),
                e: torch.cat((zero, -turns / S, -CENTRE / S * alone)),
            },
            output_bias={y: CENTRE, e: 1.0},
        )

        # A step. silu(a) - silu(-a) = a σ(a) + a σ(-a) = a, so the units silu(a) b and -silu(-a) b add up to a b:
        #     units 0, 1: y e into row y;   units 2, 3: e (e - 1) into row e, which the last step leaves out.
        # They cost no accuracy: σ(a) and σ(-a) add up to 1 within an epsilon.
        signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
        both = torch.ones(2, dtype=torch.float64)
        for layer in range(1, 1 + self.steps):
            write_mlp_units(decoder, layer, gate={y: signs}, read={e: both}, bias=0 * both, write={y: signs})
            if layer < self.steps:
                write_mlp_units(decoder, layer, gate={e: signs}, read={e: both}, bias=-both, write={e: signs}, first=2)


CONSTRUCTIONS: dict[str, Construction] = {"newton": Newton()}
