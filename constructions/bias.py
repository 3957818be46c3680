"""Heads with a relative position bias on exact positions, and ALiBi at any slopes among them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from constructions.absolute import write_reciprocal
from constructions.chords import chord_knots, n_bits, write_integers
from constructions.construction import Construction, plain_config
from constructions.layout import ONE, POSITION, Layout, write_embeddings
from constructions.observing import query_windows
from constructions.relative import write_random_content
from constructions.weights import head_weights, write_head
from probe.errors import ProbeError
from probe.models.decoder import Decoder, DecoderConfig
from probe.models.encodings import alibi_slopes

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
    def n_heads(self) -> int:
        """Heads, one a bias."""

    @abstractmethod
    def position_dimensions(self, length: int) -> int:
        """Dimensions of a head that carry its bias."""

    @abstractmethod
    def biases(self, length: int) -> dict[str, Float[Tensor, "head distance"]]:
        """What the scores are compared with: "pattern", and "wanted" if that is another; distances 0…length-1."""

    def d_head(self, length: int) -> int:
        """Those that carry the bias, and those of the content."""
        return self.position_dimensions(length) + CONTENT_DIMENSIONS

    @abstractmethod
    def layout(self, length: int) -> Layout:
        """The rows of the stream."""

    def width(self, length: int) -> int:
        """Units of the widest MLP."""
        return max(len(chord_knots(length)) - 1, n_bits(length))

    def config(self, length: int) -> DecoderConfig:
        return plain_config(self, length, n_heads=self.n_heads)

    def _content(self, length: int) -> slice:
        first = self.position_dimensions(length)
        return slice(first, first + CONTENT_DIMENSIONS)

    def write_weights(self, decoder: Decoder, length: int, dtype: torch.dtype) -> None:
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

    def errors(
        self, decoder: Decoder, tokens: Int[Tensor, "1 pos"], attention: str
    ) -> tuple[Int[Tensor, "looked_at"], dict[str, Float[Tensor, "looked_at"]]]:
        content = decoder.token_embedding.weight.detach().double()[tokens[0]]
        content = content[:, self.layout(decoder.config.n_ctx).content]
        rows, dimensions = self.layout(decoder.config.n_ctx).content, self._content(decoder.config.n_ctx)
        heads = [head_weights(decoder, self.layers - 1, head) for head in range(self.n_heads)]
        q = torch.stack([content @ W.W_Q[rows, dimensions].double() for W in heads])
        k = torch.stack([content @ W.W_K[rows, dimensions].double() for W in heads])
        biases = self.biases(decoder.config.n_ctx)
        sites = [f"blocks.{self.layers - 1}.attn.hook_{what}" for what in ("attn_scores", "pattern")]
        positions: list[Tensor] = []
        found: dict[str, list[Tensor]] = {"scores": [], **{name: [] for name in biases}}
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
    max_length: Mapping[torch.dtype, int] = {torch.float64: 8192, torch.float32: 8192}
    tolerance: Mapping[torch.dtype, Mapping[str, float]] = {
        torch.float64: {"scores": 1e-10, "pattern": 1e-12},
        torch.float32: {"scores": 2e-3, "pattern": 1e-6},
    }

    def __init__(self, slopes: Float[Tensor, "head"] | None = None):
        """One head for each slope, in nats per token, within [0, 1]; by default those of ALiBi with eight heads.
        (A negative slope puts the weight where the score is largest, and so rounded most: 2e-4 at -1/3 and 8192.)

        Raises:
            ProbeError: for no slopes, or slopes outside [0, 1].
        """
        slopes = alibi_slopes(8) if slopes is None else slopes.detach().cpu().double()
        if len(slopes) == 0 or not bool(((slopes >= 0) & (slopes <= 1)).all()):
            raise ProbeError(f"slopes must be one number or more in [0, 1], got {slopes.tolist()}")
        self.slopes = slopes

    @property
    def n_heads(self) -> int:
        return len(self.slopes)

    def position_dimensions(self, length: int) -> int:
        return 4  # d_head is then 16, so that score_scale = 1/4 is a power of two and multiplying by it rounds nothing

    def layout(self, length: int) -> Layout:
        return Layout(reciprocal=1, scratch=1, bits=0)

    def biases(self, length: int) -> dict[str, Float[Tensor, "head distance"]]:
        return {"pattern": -self.slopes[:, None] * torch.arange(length)}

    def write_bias(self, decoder: Decoder, layout: Layout, length: int) -> None:
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


CONSTRUCTIONS: dict[str, Construction] = {"exact_alibi": ExactAlibi()}
