"""Any relative bias f_rel(t - i) by cosines of looked-up phases: T5's buckets, logarithms, rotary kernels."""

import math
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from constructions.bias import BiasHeads
from constructions.chords import n_bits
from constructions.construction import Construction
from constructions.layout import Layout
from constructions.weights import Unit, write_head, write_units
from probe.attention.distance_family import pattern_from_bias
from probe.models.decoder import Decoder
from probe.models.encodings import t5_bucket


def write_table(decoder: Decoder, layer: int, bits: range, table: Float[Tensor, "row position"], rows: range) -> None:
    """Weights by which an MLP looks t up: it adds table[r, t - 1] to the r-th of ``rows``, t = 1…T, with T units.

    Any table of position embeddings is within reach of a model without any.
    """
    # Unit t: ReLU(Σ_j ±bit_j - (ones of t - 1)), + where t has a 1. It is 1 where all bits agree; each that does not
    # takes 1 off, so it is 0 elsewhere. One unit is not 0, and what is added is the table's entry, without rounding.
    T = table.shape[1]
    ones = [t.bit_count() for t in range(1, T + 1)]
    units: list[Unit] = [
        ({row: 1.0 if t >> j & 1 else -1.0 for j, row in enumerate(bits)}, 1.0 - ones[t - 1], {})
        for t in range(1, T + 1)
    ]
    write_units(decoder, layer, units)
    decoder.layers[layer].mlp.down_proj.weight.detach()[rows.start : rows.stop, :T] = table.to(decoder.dtype)


class FourierBias(BiasHeads):
    """Any bias f_rel(t - i) by K frequencies: Σ_k a_k cos ω_k (t - i) + b_k sin ω_k (t - i), in 2K head dimensions.

    How many dimensions it takes: a bias that is constant beyond a distance D, and another number at a distance δ < D
    which is the largest such, wants d_head >= ⌊T/D⌋ - 1, so no fixed d_head holds T5's buckets exactly. Proof: take the
    n = ⌊(T - 1 - δ)/D⌋ + 1 >= ⌊T/D⌋ queries at δ + aD and keys at bD (0-based), a, b = 0…n-1. For b < a the distance is
    δ + (a - b) D >= D, the score the constant; for b = a it is δ, the score another; for b > a the key is in the
    future, the score anything. Less the constant the matrix is upper triangular with a non-zero diagonal: of rank n,
    whatever stands in the future. Scores ⟨q_t, k_i⟩ may differ from f_rel by a g(t) that the softmax does not see,
    which takes one off the rank: d_head >= n - 1. (``constructions.propositions`` runs this.)
    """

    layers, attention_layers, mlp_layers = 4, 2, 3

    def __init__(
        self,
        name: str,
        claim: str,
        source: str,
        n_frequencies: int,
        bias: Callable[[Int[Tensor, "distance"]], Float[Tensor, "head distance"]],
        wanted: float,
        frequencies: Callable[[int], Float[Tensor, "frequency"]] | None = None,
        max_length: int = 1024,
    ):
        """Args:
        bias: f_rel of each head by distance, float64, in nats.
        wanted: the tolerance to that bias, up to ``max_length``: the error of the fit, as a total variation.
        frequencies: by length, in radians per token; by default the harmonics π k / length, k = 0…n_frequencies-1.
        """
        self.name, self.claim, self.source = name, claim, source
        self.n_frequencies, self.bias = n_frequencies, bias
        self.frequencies = frequencies or (lambda T: math.pi * torch.arange(n_frequencies, dtype=torch.float64) / T)
        self.max_length = {torch.float64: max_length, torch.float32: max_length}
        self.tolerance = {
            torch.float64: {"scores": 1e-9, "pattern": 1e-9, "wanted": wanted},
            torch.float32: {"scores": 5e-3, "pattern": 1e-3, "wanted": wanted + 1e-3},
        }

    @property
    def n_heads(self) -> int:
        return len(self.bias(torch.arange(1)))

    def position_dimensions(self, length: int) -> int:
        return 2 * self.n_frequencies

    def layout(self, length: int) -> Layout:
        K = self.n_frequencies
        return Layout(reciprocal=1, scratch=n_bits(length), bits=n_bits(length), cos=K, sin=K)

    def width(self, length: int) -> int:
        return max(super().width(length), length)

    def coefficients(self, length: int) -> tuple[Float[Tensor, "head frequency"], Float[Tensor, "head frequency"]]:
        """a and b: the least squares fit over the distances 0…length-1, the smallest one where it is not unique."""
        basis = self._basis(length)
        wanted = self.bias(torch.arange(length)).T
        solution = torch.linalg.lstsq(basis, wanted, rcond=1e-5, driver="gelsd").solution.T
        return solution[:, : self.n_frequencies], solution[:, self.n_frequencies :]

    def _basis(self, length: int) -> Float[Tensor, "distance coefficient"]:
        angle = torch.arange(length, dtype=torch.float64)[:, None] * self.frequencies(length)
        return torch.cat((angle.cos(), angle.sin()), dim=-1)

    def biases(self, length: int) -> dict[str, Float[Tensor, "head distance"]]:
        fitted = torch.cat(self.coefficients(length), dim=-1) @ self._basis(length).T
        return {"pattern": fitted, "wanted": self.bias(torch.arange(length))}

    def write_bias(self, decoder: Decoder, layout: Layout, length: int) -> None:
        # cos ω_k t and sin ω_k t are looked up. With c = cos ω t, s = sin ω t of the query and c', s' of the key
        #     cos ω (t - i) = c c' + s s',   sin ω (t - i) = s c' - c s',
        # so the query (a c + b s, a s - b c) and the key (c', s') give a cos ω (t - i) + b sin ω (t - i).
        angle = self.frequencies(length)[:, None] * torch.arange(1, length + 1)
        rows = range(layout["cos"].start, layout["sin"].stop)
        write_table(decoder, 2, layout["bits"], torch.cat((angle.cos(), angle.sin())), rows)
        a, b = (each / decoder.config.score_scale for each in self.coefficients(length))
        for head in range(self.n_heads):
            for k, (c, s) in enumerate(zip(layout["cos"], layout["sin"], strict=True)):
                one, two = 2 * k, 2 * k + 1
                ak, bk = a[head, k].item(), b[head, k].item()
                write_head(
                    decoder,
                    self.layers - 1,
                    head,
                    query={(c, one): ak, (s, one): bk, (s, two): ak, (c, two): -bk},
                    key={(c, one): 1.0, (s, two): 1.0},
                )


def _logarithmic(distance: Int[Tensor, "distance"]) -> Float[Tensor, "head distance"]:
    return -torch.log1p(distance.double())[None]


def t5_tables(seed: int = 0) -> Float[Tensor, "bucket head"]:
    """Tables like trained ones: each head's values fall with the bucket at a slope of its own, with noise upon them."""
    noise = torch.randn(32, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (
        -torch.log1p(torch.arange(32.0, dtype=torch.float64)[:, None] ** 1.3) * torch.tensor([1.0, 0.5]) + 0.1 * noise
    )


def _t5(distance: Int[Tensor, "distance"]) -> Float[Tensor, "head distance"]:
    return t5_tables()[t5_bucket(distance)].T


def fit_errors(
    bias: Callable[[Int[Tensor, "distance"]], Float[Tensor, "head distance"]],
    n_frequencies: Sequence[int] = (8, 16, 32, 64, 128, 256),
    length: int = 512,
) -> pd.DataFrame:
    """How the fit by Fourier features gets better with their number: for each head, the largest total variation over
    queries, in [0, 1], between softmax(f_rel) and softmax of its fit, without content.

    Columns n_frequencies, d_head (2 n_frequencies), length, head, total_variation.
    """
    rows = []
    for K in n_frequencies:
        fitted = FourierBias("", "", "", K, bias, wanted=1.0).biases(length)
        patterns = [pattern_from_bias(fitted[name]) for name in ("pattern", "wanted")]
        variation = (patterns[0] - patterns[1]).abs().sum(-1).amax(-1) / 2
        rows += [(K, 2 * K, length, head, value) for head, value in enumerate(variation.tolist())]
    return pd.DataFrame(rows, columns=["n_frequencies", "d_head", "length", "head", "total_variation"])


class RotaryKernel(FourierBias):
    """Rotary attention between equal vectors, Σ_k cos(ω_k (t - i)) with its frequencies: a kernel that needs no fit."""

    def __init__(self, n_frequencies: int = 16, base: float = 10000.0):
        K = n_frequencies
        omega = base ** (-torch.arange(K, dtype=torch.float64) / K)
        super().__init__(
            name="rotary_kernel",
            claim=f"the pattern of layer 3 is that of rotary positions between equal vectors in {K} planes",
            source="cosine features; Su et al. 2021 for the frequencies",
            n_frequencies=K,
            bias=lambda distance: torch.cos(distance.double()[:, None] * omega).sum(-1)[None],
            wanted=1e-9,
            frequencies=lambda T: omega,
        )

    def coefficients(self, length: int) -> tuple[Float[Tensor, "head frequency"], Float[Tensor, "head frequency"]]:
        ones = torch.ones(1, self.n_frequencies, dtype=torch.float64)
        return ones, torch.zeros_like(ones)


CONSTRUCTIONS: dict[str, Construction] = {
    each.name: each
    for each in (
        FourierBias(
            "logarithmic_bias",
            "the pattern of layer 3 is softmax(content - ln(1 + t - i)) to the error of a fit by 64 frequencies",
            "Fourier features of exact positions",
            64,
            _logarithmic,
            wanted=0.05,
        ),
        FourierBias(
            "t5_bias",
            "the patterns of layer 3 are those of T5's buckets with two given tables, to the error of 128 frequencies",
            "Fourier features of exact positions; Raffel et al. 2020 for the buckets",
            128,
            _t5,
            wanted=0.06,
        ),
        RotaryKernel(),
    )
}
