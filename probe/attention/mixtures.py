"""Heads that divide their attention between the first token and a kernel of the distance.

Row t is π δ₀ + (1 - π) softmax_{i ≤ t} θ·φ(t - i). Such a head rests on ``<bos>`` to the share π whatever the distance
(a sink: Xiao et al. 2024) and is relative otherwise.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn import functional as F

from probe.attention.distance_family import (
    RIDGE,
    DistanceMass,
    Features,
    PerHead,
    Theta,
    derivatives,
    descend,
    fit,
    means,
    objective,
)

# The part of the attention on key 0 that is the sink's at the starts: the objective has more than one local minimum.
STARTS = (0.0, 0.5, 1.0)

# ln π/(1 - π) of a head without a sink, π = 2e-9. So the ridge decides where the data do not.
NO_SINK = -20.0

# Where π and θ can hardly be told apart (patterns of two rows) the objective is a curved valley: do not walk along it.
TOLERANCE = 1e-9  # nats


@dataclass(frozen=True)
class SinkMixture:
    """The objective of the mixture, and one step towards its minimum. The first parameter of a head is ln π/(1 - π).

    A row from which key 0 is hidden (by a sliding window) has no sink: it is the kernel alone. ``sees_first`` says how
    many rows that leaves. Without the observed rows' own entropy and with the ridge, the mean over rows of
    KL(observed row ‖ template row) is, of the others,

        f = -Σ_t first_t ln(π + (1-π) K_t(0)) - Σ_t Σ_{i>0} mass_ti ln((1-π) K_t(i))
            + ½ RIDGE ((logit π - NO_SINK)² + |θ|²).

    As in the EM algorithm (Dempster et al. 1977), of the attention that row t pays to key 0 the share
    r_t = π/(π + (1-π) K_t(0)) is the sink's, and the rest is attention of the kernel whose rows weigh what is left of
    them, so that the kernel's own convex objective and derivatives hold. The gradient of f is that of this complete
    problem; the second derivative is its less that of the missing shares (Louis 1982). So a step can be Newton's for f
    itself, which takes some ten where plain EM takes a hundred (T5 buckets); where f is not convex the eigenvalues'
    absolute values stand for them, so that it descends everywhere.
    """

    observed: DistanceMass
    features: Features

    def expect(self, parameters: Theta) -> tuple[Float64[Tensor, "head query"], DistanceMass]:
        """r_t, and what the kernel is left with."""
        share = torch.sigmoid(parameters[:, :1] - self._log_kernel_of_first(parameters[:, 1:]))
        return share, self.without_sink(share)

    def without_sink(self, share: Float64[Tensor, "#head #query"]) -> DistanceMass:
        """The mass and rows of the kernel where the sink takes this share of the attention on key 0."""
        first, observed = share * self.observed.first, self.observed
        return DistanceMass(
            (observed.mass - first).clamp(min=0),
            (observed.rows - first).clamp(min=0),
            observed.first - first,
            (observed.sees_first - first).clamp(min=0),
        )

    def objective(self, parameters: Theta) -> tuple[PerHead, PerHead]:
        logit, theta = parameters[:, :1], parameters[:, 1:]
        # Everything as if it were the kernel's, and then what the sink adds to the weight of key 0.
        kernel, rounding = objective(theta, self.observed, self.features)
        odds = logit - self._log_kernel_of_first(theta)
        divided = self.observed.sees_first.sum(-1)  # the share of the rows that have a sink at all
        value = kernel - divided * F.logsigmoid(-logit)[:, 0] - (self.observed.first * F.softplus(odds)).sum(-1)
        return value + RIDGE / 2 * (logit[:, 0] - NO_SINK).square(), rounding + 1e-15 * value.abs()

    def step(self, parameters: Theta) -> tuple[Theta, Theta]:
        theta, weight = parameters[:, 1:], parameters[:, 0].sigmoid()
        divided = self.observed.sees_first.sum(-1)
        share, kernel = self.expect(parameters)
        of_kernel, kernel_curvature = derivatives(theta, kernel, self.features)
        sink = (share * self.observed.first).sum(-1)
        of_weight = divided * weight - sink + RIDGE * (parameters[:, 0] - NO_SINK)
        gradient = torch.cat([of_weight[:, None], of_kernel], dim=1)

        curvature = F.pad(kernel_curvature, (1, 0, 1, 0))  # of the complete problem
        curvature[:, 0, 0] = divided * weight * (1 - weight) + RIDGE
        # By how much the two explanations of attention on key 0 differ, as derivatives of their log-odds.
        _, mean = means(theta, self.features)
        contrast = torch.cat([torch.ones_like(share)[..., None], mean - self.features], dim=-1)
        unsure = self.observed.first * share * (1 - share)
        missing = torch.einsum("hqf,hq,hqg->hfg", contrast, unsure, contrast)
        eigenvalues, vectors = torch.linalg.eigh(curvature - missing)
        along = (gradient[:, None] @ vectors)[:, 0] / eigenvalues.abs().clamp(min=RIDGE)
        return gradient, (vectors @ along[..., None])[..., 0]

    def _log_kernel_of_first(self, theta: Theta) -> Float64[Tensor, "head query"]:
        """ln K_t(0): key 0 is at the distance t."""
        bias = theta @ self.features.T
        return bias - bias.logcumsumexp(-1)


def fit_sink_mixture(observed: DistanceMass, features: Features) -> tuple[PerHead, Theta]:
    """π and θ of each head with the smallest mean over observed rows of KL(observed row ‖ template row).

    The best of the descents from ``STARTS``: from each of them π is the share of the attention that the sink is given,
    and θ the fit to the rest. Where the data say nothing about π there is no sink.
    """
    mixture, found = SinkMixture(observed, features), []
    for given in STARTS:
        share = torch.full((1, 1), given, dtype=torch.float64)
        weight = ((share * observed.first).sum(-1) / observed.sees_first.sum(-1)).clamp(0.001, 0.999)
        start = torch.cat([weight.logit()[:, None], fit(mixture.without_sink(share), features)], dim=1)
        *_, last = descend(start, mixture.objective, mixture.step, TOLERANCE)
        found.append(last)
    best = torch.stack([value for _, value in found]).argmin(0)
    parameters = torch.stack([parameters for parameters, _ in found])[best, torch.arange(len(best))]
    return parameters[:, 0].sigmoid(), parameters[:, 1:]
