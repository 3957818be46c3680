"""Templates: the attention patterns that position alone would make, to compare what a model attends to with.

A template is a function ``(observed, context) -> FittedTemplate``; it reads no more than the shape of the training
patterns, and which keys they hide, unless it is a fitted one. Every fit minimises the mean over observed rows of
KL(observed row ‖ template row), in nats.

To add a template: add it to ``TEMPLATES``; if it is exponential in features of the distance, as most are, it is one
line, ``Template(Kernel(features, names).alone)``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F

from probe.attention.distance_family import DistanceMass, Theta, fit, pattern_from_bias
from probe.attention.log_odds import fit_log_odds
from probe.attention.mixtures import fit_sink_mixture
from probe.errors import ProbeError
from probe.models.encodings import alibi_slopes, t5_bucket
from probe.models.hidden_keys import nearest_keys
from probe.sequences import checked_lengths, valid_rows

T5_BUCKETS = 32  # T5's own number, with its max_distance 128
ROTARY_FREQUENCIES = 16


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
    """A causal pattern, the parameters of each head, and how many of them were fitted."""

    pattern: Float64[Tensor, "head query key"]  #: rows sum to 1 less the sink's share, 0 for hidden keys
    parameters: dict[str, Float64[Tensor, "head ..."]] = field(default_factory=dict)  #: by name, in nats or tokens
    n_parameters: int = 0  #: fitted for each head


class Observed:
    """What a template may read: patterns "batch head query key" (causal, see ``check_pattern``), their lengths, and how
    many keys each query sees, all up to its own where ``n_visible`` is None (see ``Trace.n_visible``).

    With ``sink`` the layer has a learned sink. A template is then fitted to the attention on tokens alone, and the sink
    gets the mean share that it has in each row, whatever the template.
    """

    def __init__(
        self,
        pattern: Float[Tensor, "batch head query key"],
        lengths: Int[Tensor, "batch"] | None = None,
        n_visible: Int[Tensor, "query"] | None = None,
        sink: bool = False,
    ):
        #: the share of each row on tokens, as a mean over the sequences that reach it; None without a sink
        self.on_tokens: Float64[Tensor, "head query"] | None = None
        if sink:
            share = pattern.sum(-1, dtype=torch.float64)
            reach = valid_rows(checked_lengths(lengths, len(pattern), pattern.shape[-1]), pattern.shape[-1])[:, None]
            self.on_tokens = share.where(reach, 0.0).sum(0) / reach.sum(0).clamp(min=1)
            pattern = pattern / share[..., None].clamp(min=1e-300)
        self._pattern, self._lengths = pattern, lengths
        self.n_heads, n_query = pattern.shape[1:3]
        self.n_visible = torch.arange(1, n_query + 1) if n_visible is None else n_visible[:n_query]
        self.reach = int(self.n_visible.max())  #: how many distances, 0 among them, any query sees

    @cached_property
    def mass(self) -> DistanceMass:
        """All that fits read; taken once for all of them."""
        return DistanceMass.of(self._pattern, self._lengths, self.n_visible)

    def of_bias(self, bias: Float[Tensor, "head distance"]) -> Float64[Tensor, "head query key"]:
        """The pattern that a bias by distance makes of the keys that are seen."""
        return pattern_from_bias(bias, self.n_visible)


@dataclass(frozen=True)
class Template:
    """A template, and whether it wants a trained T5 table.

    Called with patterns, the lengths of their sequences (rows beyond them do not count; all do by default), a context
    and the number of keys that each query sees (all up to its own by default), it gives the template for these heads;
    ``of`` does so for patterns that several templates are fitted to.
    """

    make: Callable[[Observed, TemplateContext], FittedTemplate]  #: the template for what was observed
    needs_t5_table: bool = False  #: whether it wants ``TemplateContext.t5_table``

    def __call__(
        self,
        pattern: Float[Tensor, "batch head query key"],
        lengths: Int[Tensor, "batch"] | None = None,
        context: TemplateContext | None = None,
        n_visible: Int[Tensor, "query"] | None = None,
        sink: bool = False,
    ) -> FittedTemplate:
        return self.of(Observed(pattern, lengths, n_visible, sink), context or TemplateContext())

    def of(self, observed: Observed, context: TemplateContext) -> FittedTemplate:
        """The template for what was observed, which several may share.

        Raises:
            ProbeError: without a T5 table where one is wanted.
        """
        if self.needs_t5_table and context.t5_table is None:
            raise ProbeError("this template wants a trained T5 table (t5_table, n_buckets × head), got none")
        fitted = self.make(observed, context)
        if observed.on_tokens is None:
            return fitted
        return replace(fitted, pattern=fitted.pattern * observed.on_tokens[..., None])


def available_templates(context: TemplateContext) -> list[str]:
    """The names of the templates that can be made in this context."""
    return [name for name, t in TEMPLATES.items() if context.t5_table is not None or not t.needs_t5_table]


def _fixed(rows: Callable[[Int[Tensor, "query"]], Tensor]) -> Callable[[Observed, TemplateContext], FittedTemplate]:
    """A template that is the same for all heads; ``rows`` makes "query key" from the number of keys that each sees."""

    def make(observed: Observed, context: TemplateContext) -> FittedTemplate:
        one = rows(observed.n_visible).double()
        return FittedTemplate(one.expand(observed.n_heads, -1, -1))

    return make


def _uniform(n_visible: Int[Tensor, "query"]) -> Float64[Tensor, "query key"]:
    """1/n on each of the n keys that are seen: what constant scores give, and theorem 1's layer of Kazemnejad et al.
    2023."""
    return nearest_keys(n_visible).double() / n_visible[:, None]


def _at_distance(distance: int) -> Callable[[Tensor], Tensor]:
    """All attention on the key at that distance, or on the furthest that is seen."""

    def rows(n_visible: Int[Tensor, "query"]) -> Tensor:
        query = torch.arange(len(n_visible))
        return F.one_hot(query - (n_visible - 1).clamp(max=distance), len(n_visible))

    return rows


def _first_token(n_visible: Int[Tensor, "query"]) -> Tensor:
    """All attention on the first token; uniform where a query does not see it, as of a head that seeks nothing else."""
    query = torch.arange(len(n_visible))
    sees_it = (n_visible == query + 1)[:, None]
    return F.one_hot(torch.zeros_like(query), len(query)).where(sees_it, _uniform(n_visible))


def _alibi(observed: Observed, context: TemplateContext) -> FittedTemplate:
    """softmax(-m_h (t - i)) with each head's own slope m_h. Press et al. 2022."""
    slopes = alibi_slopes(observed.n_heads)
    return FittedTemplate(observed.of_bias(-slopes[:, None] * torch.arange(observed.reach)), {"slope": slopes})


def _t5(observed: Observed, context: TemplateContext) -> FittedTemplate:
    """softmax of a trained T5 bias, each head with its own column of the table. Raffel et al. 2020."""
    table, n_heads = context.t5_table, observed.n_heads
    assert table is not None  # Template.fit sees to it
    if table.shape[1] != n_heads or not table.isfinite().all():
        raise ProbeError(
            f"a T5 table for these patterns must be finite, n_buckets × {n_heads} heads, got {tuple(table.shape)}"
            + ("" if table.isfinite().all() else " with NaN or infinity")
        )
    table = table.detach().double().cpu()
    bucket = t5_bucket(torch.arange(observed.reach), len(table), context.t5_max_distance)
    return FittedTemplate(observed.of_bias(table[bucket].T), {"bucket_bias": table.T})


@dataclass(frozen=True)
class Kernel:
    """Patterns softmax_{i ≤ t} θ·φ(t - i), φ >= 0 the ``features`` of the distances 0…T-1; ``names`` says what θ is.

    Softmax does not see what the features have in common with a constant or with one another: ``n_parameters`` is their
    rank beside a constant (in float64: of 16 rotary waves, 10 can be told apart within 64 tokens).
    """

    features: Callable[[Float64[Tensor, "distance"]], Float64[Tensor, "distance feature"]]  #: φ, at least 0
    names: Callable[[Theta], dict[str, Tensor]]  #: the parameters by name, from θ "head feature"

    def alone(self, observed: Observed, context: TemplateContext) -> FittedTemplate:
        """The kernel, θ by ``distance_family.fit``."""
        phi, n_parameters = self.features_of(observed.reach)
        theta = fit(observed.mass, phi)
        return FittedTemplate(observed.of_bias(theta @ phi.T), self.names(theta), n_parameters)

    def with_sink(self, observed: Observed, context: TemplateContext) -> FittedTemplate:
        """π of each row on the first token, 1 - π divided by the kernel, both by ``mixtures.fit_sink_mixture``; the
        kernel alone in rows that do not see the first token."""
        phi, n_parameters = self.features_of(observed.reach)
        weight, theta = fit_sink_mixture(observed.mass, phi)
        sees_first = observed.n_visible == torch.arange(1, len(observed.n_visible) + 1)
        weights = weight[:, None] * sees_first
        mixed = (1 - weights)[..., None] * observed.of_bias(theta @ phi.T)
        mixed[..., 0] += weights
        most = int((observed.n_visible - 1).sum())  # all that there is to know of a pattern
        return FittedTemplate(mixed, {"sink_weight": weight} | self.names(theta), min(n_parameters + 1, most))

    def features_of(self, n_query: int) -> tuple[Float64[Tensor, "distance feature"], int]:
        """φ of the distances within n_query tokens, and the number of parameters that they stand for."""
        phi = self.features(torch.arange(n_query, dtype=torch.float64))
        beside_constant = torch.cat([torch.ones(len(phi), 1, dtype=phi.dtype), phi], dim=1)
        return phi, int(torch.linalg.matrix_rank(beside_constant)) - 1


def _named(name: str, sign: int = 1) -> Callable[[Theta], dict[str, Tensor]]:
    """The one parameter of a kernel."""
    return lambda theta: {name: sign * theta[:, 0]}


def _buckets(distance: Tensor) -> Float64[Tensor, "distance bucket"]:
    """One indicator for each of T5's buckets that is within reach."""
    return F.one_hot(t5_bucket(distance.long(), T5_BUCKETS)).double()


def _bucket_biases(theta: Theta) -> dict[str, Tensor]:
    """All 32 biases in nats; those of buckets that are further away than the patterns are long are 0, without effect.

    Softmax does not see a constant added to all buckets, and a bucket without attention wants -∞. The fit's ridge
    decides both: the biases have mean 0, and such a bucket stands so far below the others that next to nothing (some
    1e-8 of a row) falls into it.
    """
    return {"bucket_bias": F.pad(theta, (0, T5_BUCKETS - theta.shape[1]))}


def _waves(distance: Tensor) -> Float64[Tensor, "distance frequency"]:
    """1 + cos(ω_k d), ω_k = 10000^(-k/K): of them is the kernel of rotary queries and keys alike. Su et al. 2021.

    Waves much longer than the patterns are parabolas: their coefficients are large and not determined one by one.
    """
    frequency = 10000.0 ** (-torch.arange(ROTARY_FREQUENCIES, dtype=torch.float64) / ROTARY_FREQUENCIES)
    return 1 + torch.cos(distance[:, None] * frequency)


# The exponential decay e^(-md), ALiBi with each head's best slope in nats per token. It is negative where the head
# prefers far keys (a head on <bos>). Where all attention is on the nearest or the furthest key, and ±∞ would be best,
# the fit's ridge stops it at about ±18, 2e-8 from that template (float64 stops it earlier where a thousand keys or more
# are far: -14 at 2,000).
ALIBI = Kernel(lambda distance: distance[:, None], _named("slope", -1))
T5 = Kernel(_buckets, _bucket_biases)
# The power law (1 + d)^-a.
POWER_LAW = Kernel(lambda distance: distance[:, None].log1p(), _named("exponent", -1))
ROTARY = Kernel(_waves, lambda theta: {"coefficients": theta})
# One distance against all others, for its log-odds: the one-key templates with what leaks from them.
PREVIOUS_TOKEN = Kernel(lambda distance: (distance[:, None] == 1).double(), _named("log_odds"))
DIAGONAL = Kernel(lambda distance: (distance[:, None] == 0).double(), _named("log_odds"))


def _window(observed: Observed, context: TemplateContext) -> FittedTemplate:
    """Bias θ on the w nearest keys: the best width w of 1…T (the least of equal ones), each with its best θ, in nats.

    θ is negative where the head prefers what is further away. Where nothing leaks the fit's ridge stops it at about 18.
    """
    mass, n = observed.mass, observed.reach
    widths = torch.arange(1, n + 1)
    favoured = torch.minimum(widths[:, None], torch.arange(1, n + 1))
    log_odds, lost = fit_log_odds(favoured, mass.rows[:, None], mass.mass.cumsum(-1))
    best = lost.argmin(-1, keepdim=True)
    width, log_odds = widths[best[:, 0]], log_odds.gather(-1, best)[:, 0]
    bias = log_odds[:, None] * (torch.arange(n) < width[:, None])
    return FittedTemplate(observed.of_bias(bias), {"width": width.double(), "log_odds": log_odds}, min(2, n - 1))


def _first_token_sink(observed: Observed, context: TemplateContext) -> FittedTemplate:
    """Bias β on the first token, in nats: row t (from 0) has e^β/(e^β + t) on it and the rest uniform.

    What constant content with a ``<bos>`` of its own makes of a head, and so what counts position without encodings.
    """
    mass, n = observed.mass, len(observed.n_visible)
    log_odds, _ = fit_log_odds(torch.ones(observed.reach, dtype=torch.long), mass.sees_first, mass.first.sum(-1))
    scores = torch.zeros(len(log_odds), n, n, dtype=torch.float64)
    scores[..., 0] = log_odds[:, None]
    rows = scores.masked_fill(~nearest_keys(observed.n_visible), -torch.inf).softmax(-1)
    return FittedTemplate(rows, {"log_odds": log_odds}, min(1, observed.reach - 1))


#: Every template by its name, the fixed ones first.
TEMPLATES: dict[str, Template] = {
    "uniform": Template(_fixed(_uniform)),
    "previous_token": Template(_fixed(_at_distance(1))),
    "diagonal": Template(_fixed(_at_distance(0))),
    "first_token": Template(_fixed(_first_token)),
    "alibi": Template(_alibi),
    "t5": Template(_t5, needs_t5_table=True),
    "previous_token_leaky": Template(PREVIOUS_TOKEN.alone),
    "diagonal_leaky": Template(DIAGONAL.alone),
    "first_token_sink": Template(_first_token_sink),
    "alibi_fitted": Template(ALIBI.alone),
    "power_law": Template(POWER_LAW.alone),
    "window": Template(_window),
    "sink_alibi": Template(ALIBI.with_sink),
    "rotary_fitted": Template(ROTARY.alone),
    "t5_fitted": Template(T5.alone),
    "sink_t5": Template(T5.with_sink),
}
