"""Relative position biases that are exact, or as exact as a fit: ALiBi at any slopes, and any f_rel by cosines."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from constructions.absolute import write_reciprocal
from constructions.chords import chord_knots, n_bits, write_integers
from constructions.construction import Construction
from constructions.layout import D_VOCAB, ONE, POSITION, Layout, write_embeddings
from constructions.observing import query_windows
from constructions.relative import write_random_content
from constructions.weights import head_weights, write_head, write_units
from probe.errors import ProbeError
from probe.models.decoder import Decoder, DecoderConfig
from probe.models.encodings import alibi_slopes, t5_bucket

CONTENT_DIMENSIONS = 12


class BiasHeads(Construction, ABC):
    """Heads of the last layer whose scores are those of random content plus a bias f_rel(t - i) of each head.

    The position dimensions of a head stand first, then CONTENT_DIMENSIONS for the content.

    Quantities, each the largest over heads and visible keys; f_cnt = ⟨q, k⟩ of the content alone, computed in float64
    from the weights and embeddings:
        scores: |score - f_cnt - f_rel(t - i)|, in nats, f_rel being what the weights are written for.
        pattern: the total variation ½ Σ_i |pattern(t, i) - softmax_i(f_cnt + f_rel(t - i))|, in [0, 1].
        wanted: the same for the f_rel that is wanted, where that differs by the error of a fit.
    They are looked at in all rows up to 512 tokens, and in 32 windows of 8 rows beyond, the rows before them run by the
    chosen attention path and kept as keys and values.
    """

    dtype_specific = True

    @property
    @abstractmethod
    def n_heads(self) -> int: ...

    @abstractmethod
    def position_dimensions(self, length: int) -> int: ...

    @abstractmethod
    def biases(self, length: int) -> dict[str, Float[Tensor, "head distance"]]:
        """What the scores are compared with: "pattern", and "wanted" if that is another; distances 0…length-1."""

    def d_head(self, length: int) -> int:
        # A power of four, so that score_scale = 1/√d_head is a power of two and multiplying by it rounds nothing.
        return 4 ** math.ceil(math.log(self.position_dimensions(length) + CONTENT_DIMENSIONS, 4))

    @abstractmethod
    def layout(self, length: int) -> Layout: ...

    def width(self, length: int) -> int:
        return max(len(chord_knots(length)) - 1, n_bits(length))

    def config(self, length: int) -> DecoderConfig:
        return DecoderConfig(
            d_vocab=D_VOCAB,
            n_ctx=length,
            n_layers=self.layers,
            d_model=self.layout(length).d_model,
            n_heads=self.n_heads,
            d_head=self.d_head(length),
            d_mlp=self.width(length),
            activation="relu",
            normalization="none",
            encoding="none",
            bias=True,
        )

    def _content(self, length: int) -> slice:
        first = self.position_dimensions(length)
        return slice(first, first + CONTENT_DIMENSIONS)

    def write_weights(self, decoder, length, dtype):
        layout = self.layout(length)
        write_embeddings(decoder, layout)
        x = layout.row("reciprocal")
        write_reciprocal(decoder, 0, x)
        position = None if layout["bits"] else POSITION
        write_integers(decoder, 0, length, dtype, x, layout["scratch"], {0: layout["bits"]}, position)
        write_random_content(decoder, self.layers - 1, layout.content, self._content(length))
        self.write_bias(decoder, layout, length)

    @abstractmethod
    def write_bias(self, decoder: Decoder, layout: Layout, length: int) -> None:
        """Weights of the layers from the third on, which find the bits of t in ``layout["bits"]``, or, where the layout
        has no rows for them, t in row POSITION."""

    def errors(self, decoder, tokens, attention):
        length = tokens.shape[1]
        content = decoder.token_embedding.weight.detach().double()[tokens[0]]
        content = content[:, self.layout(decoder.config.n_ctx).content]
        rows, dimensions = self.layout(decoder.config.n_ctx).content, self._content(decoder.config.n_ctx)
        heads = [head_weights(decoder, self.layers - 1, head) for head in range(self.n_heads)]
        q = torch.stack([content @ W.W_Q[rows, dimensions].double() for W in heads])
        k = torch.stack([content @ W.W_K[rows, dimensions].double() for W in heads])
        biases = self.biases(decoder.config.n_ctx)
        sites = [f"blocks.{self.layers - 1}.attn.hook_{what}" for what in ("attn_scores", "pattern")]
        positions, found = [], {"scores": [], **{name: [] for name in biases}}
        for query, seen in query_windows(decoder, tokens, sites, attention):
            scores, pattern = (seen[site][0] for site in sites)
            key = torch.arange(scores.shape[-1])
            distance = query[:, None] - key
            f_cnt = q[:, query] @ k[:, key].transpose(-1, -2) * decoder.config.score_scale
            for name, bias in biases.items():
                wanted = f_cnt + bias[:, distance.clamp(min=0)]
                if name == "pattern":
                    error = (scores - wanted).masked_fill(distance < 0, 0)
                    found["scores"].append(error.abs().amax(dim=(0, -1)))
                wanted = wanted.masked_fill(distance < 0, -math.inf).softmax(-1)
                found[name].append(((pattern - wanted).abs().sum(-1) / 2).amax(0))
            positions.append(query + 1)
        return torch.cat(positions), {name: torch.cat(errors) for name, errors in found.items()}


class ExactAlibi(BiasHeads):
    """ALiBi at any slopes, -m_h (t - i), from exact positions, with the products kept exact where they are large."""

    name = "exact_alibi"
    claim = "the pattern of each head of layer 2 is softmax(content - m (t - i)), m its slope: ALiBi, from NoPE"
    source = "Kazemnejad et al. 2023, Theorem 2, on exact positions"
    layers, attention_layers, mlp_layers = 3, 2, 2
    max_length: ClassVar = {torch.float64: 8192, torch.float32: 8192}
    tolerance: ClassVar = {
        torch.float64: {"scores": 1e-10, "pattern": 1e-12},
        torch.float32: {"scores": 2e-3, "pattern": 1e-6},
    }

    def __init__(self, slopes: Float[Tensor, "head"] | None = None):
        """One head for each slope, in nats per token, within [-1, 1]; by default those of ALiBi with eight heads.

        Raises:
            ProbeError: for no slopes, or slopes outside [-1, 1].
        """
        slopes = alibi_slopes(8) if slopes is None else slopes.detach().cpu().double()
        if len(slopes) == 0 or not bool((slopes.abs() <= 1).all()):
            raise ProbeError(f"slopes must be one number or more in [-1, 1], got {slopes.tolist()}")
        self.slopes = slopes

    @property
    def n_heads(self):
        return len(self.slopes)

    def position_dimensions(self, length):
        return 4

    def layout(self, length):
        return Layout(reciprocal=1, scratch=1, bits=0)

    def biases(self, length):
        return {"pattern": -self.slopes[:, None] * torch.arange(length)}

    def write_bias(self, decoder, layout, length):
        # As in Theorem 2 (relative.py), a query (m, -m t) and a key (i, 1) give m i - m t = -m (t - i). The products
        # reach m T, where float32 has no digits left for the difference: an error of 2⁻¹² at 4096 is an error of the
        # pattern. So m = coarse + fine, with so few bits in coarse, 24 - n_bits(T), that coarse · t is exact for every
        # t <= T, and so is coarse i - coarse t, a multiple of the same power of two: summed first (dimensions 0 and 1),
        # they leave the exact coarse part of the distance's penalty. |fine| < 2^-(23 - n_bits) |m|, so that rounding
        # fine i - fine t (dimensions 2 and 3) errs by 2⁻²⁴ · 2^-(23 - n_bits) m T <= 2⁻²⁴ m · 2 at T = 2¹¹ and
        # 2^-21 at T = 2¹³. The content comes last and is rounded at the size of the whole score, -m (t - i), which is
        # large only where the softmax gives the key nothing. For slopes that are powers of two fine = 0.
        keep = 24 - n_bits(length)
        last = self.layers - 1
        for head, slope in enumerate(self.slopes.tolist()):
            mantissa, exponent = math.frexp(slope)
            coarse = math.ldexp(round(math.ldexp(mantissa, keep)), exponent - keep)
            for part, first in ((coarse, 0), (slope - coarse, 2)):
                scale = part / decoder.config.score_scale
                write_head(
                    decoder,
                    last,
                    head,
                    query={(ONE, first): scale, (POSITION, first + 1): -scale},
                    key={(POSITION, first): 1.0, (ONE, first + 1): 1.0},
                )


def write_table(decoder: Decoder, layer: int, bits: range, table: Float[Tensor, "row position"], rows: range) -> None:
    """Weights by which an MLP looks t up: it adds table[r, t - 1] to the r-th of ``rows``, t = 1…T, with T units.

    Any table of position embeddings is within reach of a model without any.
    """
    # Unit t: ReLU(Σ_j ±bit_j - (ones of t - 1)), + where t has a 1. It is 1 where all bits agree; each that does not
    # takes 1 off, so it is 0 elsewhere. One unit is not 0, and what is added is the table's entry, without rounding.
    T = table.shape[1]
    ones = [t.bit_count() for t in range(1, T + 1)]
    units = [({row: 1.0 if t >> j & 1 else -1.0 for j, row in enumerate(bits)}, 1.0 - ones[t - 1], {}) for t in range(1, T + 1)]
    write_units(decoder, layer, units)
    decoder.layers[layer].mlp.down_proj.weight.detach()[rows.start : rows.stop, :T] = table.to(decoder.dtype)


class FourierBias(BiasHeads):
    """Any bias f_rel(t - i) by K frequencies: Σ_k a_k cos ω_k (t - i) + b_k sin ω_k (t - i), in 2K head dimensions.

    How many dimensions it takes: a bias that is constant beyond a distance D, and another number at a distance δ < D
    which is the largest such, wants d_head >= ⌊T/D⌋ - 1, so no fixed d_head holds T5's buckets exactly. Proof: take the
    n = ⌊(T - 1 - δ)/D⌋ + 1 >= ⌊T/D⌋ queries at δ + aD and keys at bD (0-based), a, b = 0…n-1. For b < a the distance is
    δ + (a - b) D >= D, the score the constant; for b = a it is δ, the score another; for b > a the key is in the future,
    the score anything. Less the constant the matrix is upper triangular with a non-zero diagonal: of rank n, whatever
    stands in the future. Scores ⟨q_t, k_i⟩ may differ from f_rel by a g(t) that the softmax does not see, which takes
    one off the rank: d_head >= n - 1. (``constructions.propositions`` runs this.)
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
    def n_heads(self):
        return len(self.bias(torch.arange(1)))

    def position_dimensions(self, length):
        return 2 * self.n_frequencies

    def layout(self, length):
        K = self.n_frequencies
        return Layout(reciprocal=1, scratch=n_bits(length), bits=n_bits(length), cos=K, sin=K)

    def width(self, length):
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

    def biases(self, length):
        fitted = torch.cat(self.coefficients(length), dim=-1) @ self._basis(length).T
        return {"pattern": fitted, "wanted": self.bias(torch.arange(length))}

    def write_bias(self, decoder, layout, length):
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
    return -torch.log1p(torch.arange(32.0, dtype=torch.float64)[:, None] ** 1.3) * torch.tensor([1.0, 0.5]) + 0.1 * noise


def _t5(distance: Int[Tensor, "distance"]) -> Float[Tensor, "head distance"]:
    return t5_tables()[t5_bucket(distance)].T


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

    def coefficients(self, length):
        ones = torch.ones(1, self.n_frequencies, dtype=torch.float64)
        return ones, torch.zeros_like(ones)


CONSTRUCTIONS: dict[str, Construction] = {
    each.name: each
    for each in (
        ExactAlibi(),
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
