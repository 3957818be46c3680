"""Alternatives to the softmax: what turns scores into a pattern, and what queries are multiplied with before."""

import math
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional as F

from probe.config import check_number, check_size
from probe.models.encodings.base import build


class AttentionFunction(nn.Module):
    """The softmax, without any scale; and the interface of all others.

    A scale of the scores of a query is a scale of the query: queries are multiplied before they meet the keys, so that
    the fused kernel, a cache of keys and the sites see nothing new. A rotation commutes with it. What an encoding adds
    to the scores as a bias of positions is not scaled; the content biases of CoPE and Transformer-XL are made of the
    scaled queries.

    The query at index i of a sequence, 0-based, sees n = i + 1 keys.
    """

    is_softmax = True  # whether ``normalise`` is the softmax, for which there is a fused kernel

    def __init__(self, *, d_model: int, n_heads: int, n_ctx: int):
        super().__init__()
        self.d_model, self.n_heads, self.n_ctx = d_model, n_heads, n_ctx

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial parameters; functions without parameters have none to draw."""

    def query_scale(
        self, hidden: Float[Tensor, "batch pos d_model"], first: int
    ) -> Float[Tensor, "#batch pos head"] | None:
        """What the queries are multiplied with, or None; ``first`` tokens stand before those of ``hidden``.

        ``hidden`` is what queries, keys and values are made of: the normalised residual stream. Where the scale is the
        same for every sequence, there is one.
        """
        return None

    def normalise(self, scores: Float[Tensor, "*batch query key"]) -> Float[Tensor, "*batch query key"]:
        """The pattern of scores, -inf where a key is hidden: its rows sum to 1 and are 0 at hidden keys. No row is
        hidden wholly."""
        return scores.softmax(dim=-1)


class LogLength(AttentionFunction):
    """Softmax of λ_n · z, λ_n = 1 + a ln(n / L) for a query that sees n > L keys, and 1 for others.

    It keeps a pattern from flattening beyond the trained length L (``trained_length``, by default n_ctx). Wang et al.
    2024, "Length Generalization of Causal Transformers without Position Encoding": a = 0.3973 is their fit to the best
    temperatures of a model without position encoding. They have one λ for a sequence, by its length; here it is each
    query's own, so that what comes later in a sequence changes nothing before.
    """

    def __init__(self, *, a: float = 0.3973, trained_length: int | None = None, **dimensions: int):
        super().__init__(**dimensions)
        check_number("a", a, closed=True)
        if trained_length is not None:
            check_size("trained_length", trained_length)
        self.a, self.trained_length = a, self.n_ctx if trained_length is None else trained_length

    def query_scale(self, hidden: Float[Tensor, "batch pos d_model"], first: int) -> Float[Tensor, "#batch pos head"]:
        beyond = (_log_keys(hidden.shape[1], first) - math.log(self.trained_length)).clamp(min=0)
        scale = (1 + self.a * beyond).to(hidden)
        return scale[None, :, None].expand(1, -1, self.n_heads)


class PositionScale(AttentionFunction):
    """Softmax of s_n · z, s_n = 1 + a ln(⌊n / L⌋ + 1) for a query that sees n keys: Llama 4's temperature.

    It is 1 until L keys are seen and rises in steps of L. Llama 4's layers without positions have a = 0.1 and L = 8192
    (``attn_scale`` and ``floor_scale`` in its config).
    """

    def __init__(self, *, a: float = 0.1, step: int = 8192, **dimensions: int):
        super().__init__(**dimensions)
        check_number("a", a, closed=True)
        check_size("step", step)
        self.a, self.step = a, step

    def query_scale(self, hidden: Float[Tensor, "batch pos d_model"], first: int) -> Float[Tensor, "#batch pos head"]:
        n = torch.arange(first + 1, first + hidden.shape[1] + 1, dtype=torch.float64, device="cpu")
        scale = (1 + self.a * ((n / self.step).floor() + 1).log()).to(hidden)
        return scale[None, :, None].expand(1, -1, self.n_heads)


class ScalableSoftmax(AttentionFunction):
    """Softmax of s ln(n) · z for a query that sees n keys, s a learned number of each head.

    Scalable-Softmax (SSMax), Nakanishi 2025, section 2. s starts at 1 / ln(n_ctx): a plain softmax where n_ctx keys are
    seen, and a flatter one before. A query that sees one key is scaled by 0, which changes nothing.
    """

    def __init__(self, **dimensions: int):
        super().__init__(**dimensions)
        self.s = nn.Parameter(torch.empty(self.n_heads))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.constant_(self.s, 1 / math.log(max(self.n_ctx, 2)))

    def query_scale(self, hidden: Float[Tensor, "batch pos d_model"], first: int) -> Float[Tensor, "#batch pos head"]:
        return self.s * _log_keys(hidden.shape[1], first).to(hidden)[None, :, None]


class Entmax15(AttentionFunction):
    """1.5-entmax of the scores z: p_i = max(z_i / 2 - τ, 0)², with the τ for which Σ p_i = 1.

    Keys more than 2 below the highest score have exactly 0, others may have. Peters et al. 2019, section 3, by their
    package ``entmax``.
    """

    is_softmax = False

    def normalise(self, scores: Float[Tensor, "*batch query key"]) -> Float[Tensor, "*batch query key"]:
        from entmax import entmax15  # imports late: nobody else needs it

        # Its τ comes from differences of sums, for which half precision is too coarse.
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return entmax15(wide, dim=-1).to(scores.dtype)


# softplus(-4) = 0.018: with weights of 0 the scale of the scores starts at 1.018.
INITIAL_B_BETA = -4.0


class AdaptiveScalableEntmax(Entmax15):
    """1.5-entmax of (1 + β (ln n)^γ) · z for a query that sees n keys, β and γ of each head and query.

    β = softplus(w_β·h + b_β), γ = gamma_range · tanh(w_γ·h), h the hidden state that enters attention.
    Adaptive-Scalable Entmax (ASEntmax), Vasylenko et al. 2025, "Long-Context Generalization with Sparse Attention",
    with δ = 1. In their code the bias b_β is an option and gamma_range is 2 unless set. It starts near plain entmax:
    weights 0, b_β = -4. Where n = 1, (ln n)^γ may be infinite and nothing depends on it, so n counts as 2 there; their
    code shifts all n by one.
    """

    def __init__(self, *, gamma_range: float = 1.0, **dimensions: int):
        super().__init__(**dimensions)
        check_number("gamma_range", gamma_range)
        self.gamma_range = gamma_range
        self.w_beta = nn.Parameter(torch.empty(self.n_heads, self.d_model))
        self.w_gamma = nn.Parameter(torch.empty(self.n_heads, self.d_model))
        self.b_beta = nn.Parameter(torch.empty(self.n_heads))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.zeros_(self.w_beta)
        nn.init.zeros_(self.w_gamma)
        nn.init.constant_(self.b_beta, INITIAL_B_BETA)

    def query_scale(self, hidden: Float[Tensor, "batch pos d_model"], first: int) -> Float[Tensor, "#batch pos head"]:
        beta = F.softplus(F.linear(hidden, self.w_beta, self.b_beta))
        gamma = self.gamma_range * F.linear(hidden, self.w_gamma).tanh()
        log_n = _log_keys(hidden.shape[1], first).clamp(min=math.log(2)).to(hidden)
        return 1 + beta * log_n[:, None] ** gamma


def _log_keys(n: int, first: int) -> Float64[Tensor, "pos"]:
    """ln of how many keys each of n queries sees, ``first`` tokens before them."""
    return torch.arange(first + 1, first + n + 1, dtype=torch.float64, device="cpu").log()


def make_attention_function(name: str, options: dict[str, Any], **dimensions: int) -> AttentionFunction:
    """The attention function of that name, for ``d_model, n_heads, n_ctx``.

    Raises:
        ProbeError: for an unknown name or option, or an impossible value.
    """
    return build(ATTENTION_FUNCTIONS, "attention function", name, options, **dimensions)


ATTENTION_FUNCTIONS: dict[str, type[AttentionFunction]] = {
    "softmax": AttentionFunction,
    "log_length": LogLength,
    "position_scale": PositionScale,
    "ssmax": ScalableSoftmax,
    "entmax15": Entmax15,
    "asentmax": AdaptiveScalableEntmax,
}
