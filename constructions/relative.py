"""Relative position out of absolute position: from the second layer on, heads with an ALiBi bias of any slope."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from constructions.absolute import write_absolute_position
from constructions.construction import Construction
from constructions.layout import CONTENT, D_MODEL, D_VOCAB, N_CONTENT, ONE, POSITION, write_embeddings
from constructions.observing import observe
from constructions.weights import head_weights, write_head
from probe.errors import ProbeError
from probe.models.decoder import Decoder, DecoderConfig
from probe.models.encodings import alibi_slopes

# The last two dimensions of a head carry position, those before them content. d_head is a power of four, so that
# score_scale = 1/√d_head is a power of two and multiplying by it or by √d_head rounds nothing.
D_HEAD = 16
HERE, THERE = D_HEAD - 2, D_HEAD - 1


def write_relative_bias(decoder: Decoder, layer: int, head: int, slope: float) -> None:
    """Weights by which -slope · (t - i) is added to the score of query t and key i; dimensions HERE and THERE must
    be free.

    It wants 1 in row ONE and the position in row POSITION. Kazemnejad et al. 2023, Theorem 2 and its proof in
    appendix C, where Eq. 29, the keys', prints W_V for W_K.
    """
    # The query at t carries (1, -t) and the key at i carries (i, 1), so these two dimensions add 1·i - t·1 = -(t - i)
    # to ⟨q_t, k_i⟩. The query is further multiplied by slope/score_scale: the decoder multiplies the product by
    # score_scale, and -slope · (t - i) remains. All other dimensions are untouched, and what they add is f_cnt:
    #     score(t, i) = f_cnt(q_t, k_i) - slope · (t - i).
    # (The softmax over i does not see -slope · t: an error of t counts in the key, not in the query.)
    scale = slope / decoder.config.score_scale
    write_head(
        decoder,
        layer,
        head,
        query={(ONE, HERE): scale, (POSITION, THERE): -scale},
        key={(POSITION, HERE): 1.0, (ONE, THERE): 1.0},
    )


def write_random_content(decoder: Decoder, layer: int, content: slice, dimensions: slice, seed: int = 1) -> None:
    """W_Q and W_K ~ N(0, 1/N_CONTENT) from the content rows to those dimensions of every head of a layer."""
    generator = torch.Generator().manual_seed(seed)
    for head in range(decoder.config.n_heads):
        W = head_weights(decoder, layer, head)
        for matrix in (W.W_Q, W.W_K):
            weights = matrix[content, dimensions]
            weights.copy_(torch.randn(weights.shape, generator=generator, dtype=torch.float64))
            weights /= math.sqrt(N_CONTENT)


class RelativePosition(Construction):
    """Kazemnejad et al. 2023, Theorem 2: the heads of the second layer have the bias -m (t - i), head h the slope m_h.

    The first layer is that of Theorem 1. The second has random content weights, W_Q and W_K ~ N(0, 1/N_CONTENT) from
    the content rows to all but two dimensions of each head, and leaves the stream as it is. Each quantity is the
    largest over heads, queries and visible keys; f_cnt are the scores of the same layer where only the content rows
    reach it.

    Quantities:
        scores: |score - f_cnt + m (t - i)|, in nats.
        pattern: the total variation ½ Σ_i |pattern(t, i) - softmax_i(f_cnt - m (t - i))|, in [0, 1].
    """

    name = "relative_position"
    claim = "the scores of layer 1 are those of the content alone minus m (t - i), m the slope of the head"
    source = "Kazemnejad et al. 2023, Theorem 2"
    layers, attention_layers, mlp_layers = 2, 2, 1
    # Measured with slopes up to 1: scores 4e-10 and pattern 8e-11 in float64 at 2048, 2e-2 and 2e-3 in float32 at 1024.
    # It is the position's own error, times the slope; those of small t in the keys are the largest.
    max_length: Mapping[torch.dtype, int] = {torch.float64: 2048, torch.float32: 1024}
    tolerance: Mapping[torch.dtype, Mapping[str, float]] = {
        torch.float64: {"scores": 1e-8, "pattern": 1e-9},
        torch.float32: {"scores": 0.05, "pattern": 0.01},
    }
    attention_paths = ("explicit",)  # the fused kernel holds no scores

    def __init__(self, slopes: Float[Tensor, "head"] | None = None):
        """One head for each slope, in nats per token, within [-1, 1], for which the tolerances were measured; by
        default those of ALiBi with eight heads.

        Raises:
            ProbeError: for no slopes, or slopes outside [-1, 1].
        """
        slopes = alibi_slopes(8) if slopes is None else slopes.detach().cpu().double()
        if len(slopes) == 0 or not bool((slopes.abs() <= 1).all()):
            raise ProbeError(f"slopes must be one number or more in [-1, 1], got {slopes.tolist()}")
        self.slopes = slopes

    def config(self, length: int) -> DecoderConfig:
        return DecoderConfig(
            d_vocab=D_VOCAB,
            n_ctx=length,
            n_layers=self.layers,
            d_model=D_MODEL,
            n_heads=len(self.slopes),
            d_head=D_HEAD,
            d_mlp=length,
            activation="relu",
            normalization="none",
            encoding="none",
            bias=True,
        )

    def write_weights(self, decoder: Decoder, length: int, dtype: torch.dtype) -> None:
        write_embeddings(decoder)
        write_absolute_position(decoder, layer=0, length=length)
        write_random_content(decoder, 1, CONTENT, slice(0, HERE))
        for head, slope in enumerate(self.slopes.tolist()):
            write_relative_bias(decoder, layer=1, head=head, slope=slope)

    def errors(
        self, decoder: Decoder, tokens: Int[Tensor, "1 pos"], attention: str
    ) -> tuple[Int[Tensor, "looked_at"], dict[str, Float[Tensor, "looked_at"]]]:
        scores_site, pattern_site = "blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern"

        def content_alone(resid: Tensor) -> Tensor:
            content = torch.zeros_like(resid)
            content[..., CONTENT] = decoder.token_embedding(tokens.to(decoder.device))[..., CONTENT]
            return content

        seen = observe(decoder, tokens, (scores_site, pattern_site), attention=attention)
        content = observe(
            decoder, tokens, (scores_site,), attention=attention, edits={"blocks.1.hook_resid_pre": content_alone}
        )
        t = torch.arange(tokens.shape[1], dtype=torch.float64)
        distance = t[:, None] - t[None, :]
        future = distance < 0
        largest: dict[str, list[Tensor]] = {"scores": [], "pattern": []}
        for head, slope in enumerate(self.slopes.tolist()):
            wanted = content[scores_site][:, head] - slope * distance
            error = (seen[scores_site][:, head] - wanted).masked_fill(future, 0)
            largest["scores"].append(error.abs().amax(dim=(0, -1)))
            error = seen[pattern_site][:, head] - wanted.masked_fill(future, -math.inf).softmax(dim=-1)
            largest["pattern"].append(error.abs().sum(-1).amax(0) / 2)
        return t.long() + 1, {quantity: torch.stack(values).amax(0) for quantity, values in largest.items()}


CONSTRUCTIONS: dict[str, Construction] = {"relative_position": RelativePosition()}
