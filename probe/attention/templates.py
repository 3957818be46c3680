"""Templates: the attention patterns that position alone would make, to compare what a model attends to with.

A template is a function ``(pattern, lengths, context) -> FittedTemplate``; it reads no more than the shape of the
training patterns unless it is a fitted one. To add one: add it to ``TEMPLATES``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F

from probe.attention.distance_family import DistanceMass, fit, pattern_from_bias
from probe.errors import ProbeError
from probe.models.encodings import alibi_slopes, t5_bucket

T5_BUCKETS = 32  # T5's own number, with its max_distance 128


@dataclass(frozen=True)
class TemplateContext:
    """What a template may need to know beside the patterns.

    ``t5_table`` is a trained T5 bias in nats, as ``probe.models.encodings.T5`` and Hugging Face's
    ``relative_attention_bias.weight`` hold it; ``t5_max_distance`` the distance from which on its last bucket is used.
    """

    t5_table: Float[Tensor, "n_buckets head"] | None = None
    t5_max_distance: int = 128


@dataclass(frozen=True)
class FittedTemplate:
    """A causal pattern whose rows sum to 1, the parameters of each head, and how many of them were fitted."""

    pattern: Float64[Tensor, "head query key"]
    parameters: dict[str, Float64[Tensor, "head ..."]] = field(default_factory=dict)
    n_parameters: int = 0


@dataclass(frozen=True)
class Template:
    """A template, and whether it wants a trained T5 table.

    Called with patterns "batch head query key" (causal, see ``check_pattern``), the lengths of their sequences (rows
    beyond them do not count; all do by default) and a context, it gives the template for these heads.
    """

    make: Callable[[Tensor, Tensor | None, TemplateContext], FittedTemplate]
    needs_t5_table: bool = False

    def __call__(
        self,
        pattern: Float[Tensor, "batch head query key"],
        lengths: Int[Tensor, "batch"] | None = None,
        context: TemplateContext | None = None,
    ) -> FittedTemplate:
        context = context or TemplateContext()
        if self.needs_t5_table and context.t5_table is None:
            raise ProbeError("this template wants a trained T5 table (t5_table, n_buckets × head), got none")
        return self.make(pattern, lengths, context)


def available_templates(context: TemplateContext) -> list[str]:
    """The names of the templates that can be made in this context."""
    return [name for name, t in TEMPLATES.items() if context.t5_table is not None or not t.needs_t5_table]


def _fixed(rows: Callable[[Int[Tensor, "query"]], Tensor]):
    """A template that is the same for all heads; ``rows`` makes "query key" from the positions 0…T-1."""

    def make(pattern: Tensor, lengths: Tensor | None, context: TemplateContext) -> FittedTemplate:
        one = rows(torch.arange(pattern.shape[-1])).double()
        return FittedTemplate(one.expand(pattern.shape[1], -1, -1))

    return make


def _uniform(query: Int[Tensor, "query"]) -> Float64[Tensor, "query key"]:
    """1/t on each of the t visible keys: what constant scores give, and theorem 1's layer of Kazemnejad et al. 2023."""
    return torch.ones(len(query), len(query), dtype=torch.float64).tril() / (query[:, None] + 1)


def _to_key(key: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """All attention on one key of each query."""
    return lambda query: F.one_hot(key(query), len(query))


def _alibi(pattern: Tensor, lengths: Tensor | None, context: TemplateContext) -> FittedTemplate:
    """softmax(-m_h (t - i)) with each head's own slope m_h. Press et al. 2022."""
    return _of_slopes(alibi_slopes(pattern.shape[1]), pattern.shape[-1])


def _alibi_fitted(pattern: Tensor, lengths: Tensor | None, context: TemplateContext) -> FittedTemplate:
    """ALiBi with each head's best slope by ``distance_family.fit``, in nats per token.

    It is negative where the head prefers far keys (a head on ``<bos>``). Where all attention is on the nearest or the
    furthest key, and ±∞ would be best, the fit's ridge stops it at about ±18, 2e-8 from that template (float64 stops it
    earlier where a thousand keys or more are far: -14 at 2,000).
    """
    observed = DistanceMass.of(pattern, lengths)
    distance = torch.arange(pattern.shape[-1], dtype=torch.float64)
    slopes = -fit(observed, distance[:, None])[:, 0]
    return _of_slopes(slopes, len(distance), n_parameters=1)


def _of_slopes(slopes: Float64[Tensor, "head"], n_query: int, n_parameters: int = 0) -> FittedTemplate:
    bias = -slopes[:, None] * torch.arange(n_query)
    return FittedTemplate(pattern_from_bias(bias), {"slope": slopes}, n_parameters)


def _t5(pattern: Tensor, lengths: Tensor | None, context: TemplateContext) -> FittedTemplate:
    """softmax of a trained T5 bias, each head with its own column of the table. Raffel et al. 2020."""
    table, n_heads = context.t5_table, pattern.shape[1]
    if table.shape[1] != n_heads or not table.isfinite().all():
        raise ProbeError(
            f"a T5 table for these patterns must be finite, n_buckets × {n_heads} heads, got {tuple(table.shape)}"
            + ("" if table.isfinite().all() else " with NaN or infinity")
        )
    table = table.detach().double().cpu()
    bucket = t5_bucket(torch.arange(pattern.shape[-1]), len(table), context.t5_max_distance)
    return FittedTemplate(pattern_from_bias(table[bucket].T), {"bucket_bias": table.T})


def _t5_fitted(pattern: Tensor, lengths: Tensor | None, context: TemplateContext) -> FittedTemplate:
    """T5 with each head's best bias for each of the 32 buckets by ``distance_family.fit``, in nats.

    Softmax does not see a constant added to all buckets, and a bucket without attention wants -∞. The fit's ridge
    decides both: the biases have mean 0, and such a bucket stands so far below the others that next to nothing (some
    1e-8 of a row) falls into it. Buckets further away than the patterns are long have the bias 0 and no effect.
    Fitted parameters: the buckets within reach, less one for the constant.
    """
    bucket = t5_bucket(torch.arange(pattern.shape[-1]), T5_BUCKETS)
    within_reach = int(bucket[-1]) + 1
    features = F.one_hot(bucket, within_reach).double()
    theta = fit(DistanceMass.of(pattern, lengths), features)
    biases = F.pad(theta, (0, T5_BUCKETS - within_reach))
    return FittedTemplate(pattern_from_bias(theta @ features.T), {"bucket_bias": biases}, within_reach - 1)


TEMPLATES: dict[str, Template] = {
    "uniform": Template(_fixed(_uniform)),
    "previous_token": Template(_fixed(_to_key(lambda query: (query - 1).clamp(min=0)))),
    "diagonal": Template(_fixed(_to_key(lambda query: query))),
    "first_token": Template(_fixed(_to_key(torch.zeros_like))),
    "alibi": Template(_alibi),
    "alibi_fitted": Template(_alibi_fitted),
    "t5": Template(_t5, needs_t5_table=True),
    "t5_fitted": Template(_t5_fitted),
}
