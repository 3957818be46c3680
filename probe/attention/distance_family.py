"""Attention patterns that depend on the distance alone, and the one fit of all of them.

Row t of such a pattern is softmax over the keys i ≤ t of a bias b(t - i). With b(d) = θ·φ(d) for given features φ this
is an exponential family: ALiBi has the single feature d, with θ = -slope; T5 one indicator for each bucket of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from probe.errors import ProbeError
from probe.limits import current
from probe.sequences import checked_lengths, valid_rows

# Where no finite θ is best (a head that never attends some distance wants a bias of -∞ there) or the best one is not
# unique (softmax does not see a constant), ½ RIDGE |θ|² decides. It shifts a well-determined θ by RIDGE θ / Var φ.
RIDGE = 1e-9

_EPS = torch.finfo(torch.float64).eps

Features = Float64[Tensor, "distance feature"]
Theta = Float64[Tensor, "head feature"]
PerHead = Float64[Tensor, "head"]


def by_distance(rows: Float[Tensor, "*stack query key"]) -> Float[Tensor, "*stack query distance"]:
    """Row t with its entries i = 0…t in the order of the distance t - i, zeros after them. Its own inverse."""
    n = rows.shape[-1]
    index = torch.arange(n, device=rows.device)
    return rows.gather(-1, (index[:, None] - index).clamp(min=0).expand(rows.shape)).tril()


def pattern_from_bias(
    bias: Float[Tensor, "head distance"], n_visible: Int[Tensor, "query"] | None = None
) -> Float64[Tensor, "head query key"]:
    """The causal pattern of the scores b(query - key): each head's rows are softmax_{i ≤ t} b(t - i).

    ``n_visible`` says how many keys each query sees, its nearest ones, where that is not all of them; then ``bias`` may
    end after as many distances as any query sees.
    """
    n_visible = torch.arange(1, bias.shape[-1] + 1) if n_visible is None else n_visible
    n = len(n_visible)
    bias = torch.nn.functional.pad(bias.double(), (0, n - bias.shape[-1]))
    hidden = torch.arange(n) >= n_visible[:, None]
    return by_distance(bias[:, None].expand(-1, n, -1).masked_fill(hidden, -torch.inf).softmax(-1))


@dataclass(frozen=True)
class DistanceMass:
    """All that the fits have to know of the observed patterns: they enter the objectives through nothing else.

    A row counts by how many keys it sees, which are its nearest ones. Where no key is hidden, row t sees the distances
    0…t. Where a layer hides keys, a row is filed under the furthest distance that it sees: with a sliding window of w
    keys all rows from w - 1 on under w - 1, so that no distance from w on is in any row.

    ``mass[h, d]`` is the attention that head h pays at distance d, as a mean over rows (it sums to 1 over d);
    ``rows[h, d]`` the share of the rows that see the distances 0…d (it sums to 1), one for all heads unless rows have
    weights; ``first[h, d]`` the attention that these rows pay to key 0, in the unit of ``mass``, where key 0 is the
    furthest that they see: the part of ``mass[h, d]`` that a sink on the first token may account for; ``sees_first[d]``
    the share of the rows of which that is so.
    """

    mass: Float64[Tensor, "head distance"]
    rows: Float64[Tensor, "#head distance"]
    first: Float64[Tensor, "head distance"]
    sees_first: Float64[Tensor, "#head distance"]

    @classmethod
    def of(
        cls,
        pattern: Float[Tensor, "batch head query key"],
        lengths: Int[Tensor, "batch"] | None = None,
        n_visible: Int[Tensor, "query"] | None = None,
    ) -> "DistanceMass":
        """Those of causal patterns; rows at or beyond a sequence's length do not count. ``n_visible`` is how many keys
        each query sees, all up to its own where None.

        Raises:
            ProbeError: for rows that do not sum to 1 over the keys that they see (NaN, no softmax, not causal), or
                lengths that do not fit.
        """
        batch, _, n_query, _ = pattern.shape
        valid = valid_rows(checked_lengths(lengths, batch, n_query), n_query)
        total = sum(p.where(v[:, None], 0.0).double() for p, v in zip(pattern, valid, strict=True))
        by_row = by_distance(total)
        mass, n_rows = by_row.sum(-2), valid.sum()
        all_mass = mass.sum(-1, keepdim=True)
        wrong = ~((all_mass[:, 0] / n_rows - 1).abs() <= torch.finfo(pattern.dtype).eps ** 0.5)
        if wrong.any():
            head = int(wrong.nonzero()[0])
            raise ProbeError(
                "a template is fitted to causal rows that sum to 1, but those of head "
                f"{head} sum to {float(all_mass[head, 0] / n_rows):.6g} on average"
            )
        # Divided by its own sum, not by the number of rows: they sum to 1 only up to the rounding of their dtype.
        return cls.by_row(mass / all_mass, valid.sum(0).double() / n_rows, total[..., 0] / all_mass, n_visible)

    @classmethod
    def by_row(
        cls,
        mass: Float64[Tensor, "head distance"],
        rows: Float64[Tensor, "query"],
        first: Float64[Tensor, "head query"],
        n_visible: Int[Tensor, "query"] | None = None,
    ) -> "DistanceMass":
        """Those of the mass by distance, the share of rows t among all rows, and the attention of rows t to key 0."""
        if n_visible is None:
            return cls(mass, rows[None], first, rows[None])
        furthest, width = n_visible - 1, int(n_visible.max())
        sees_first = (furthest == torch.arange(len(n_visible))).double()

        def filed(x: Float64[Tensor, "*head query"]) -> Float64[Tensor, "*head distance"]:
            return torch.zeros(*x.shape[:-1], width, dtype=x.dtype).index_add_(-1, furthest, x)

        return cls(mass[:, :width], filed(rows)[None], filed(first * sees_first), filed(rows * sees_first)[None])


def fit(observed: DistanceMass, features: Features) -> Theta:
    """The θ of each head that minimises the mean over observed rows of KL(observed row ‖ template row).

    Without the observed rows' own entropy, which does not depend on θ, and with the ridge, the objective is

        f(θ) = Σ_t rows_t ln Z_t(θ) - Σ_d mass_d θ·φ(d) + ½ RIDGE |θ|²,    Z_t(θ) = Σ_{d ≤ t} exp(θ·φ(d)),

    which is strictly convex, so its minimum is the only point of zero gradient: there the template has the observed
    mean of every feature, but for RIDGE θ. Newton's method (``descend``) from θ = 0. Features must be >= 0 (a constant
    added to one changes nothing but the rounding); time and memory are O(head distance feature).
    """
    start = observed.mass.new_zeros(len(observed.mass), features.shape[1])

    def step(theta: Theta) -> tuple[Theta, Theta]:
        gradient, hessian = derivatives(theta, observed, features)
        return gradient, torch.linalg.solve(hessian, gradient)

    *_, (theta, _) = descend(start, lambda theta: objective(theta, observed, features), step)
    return theta


def descend(
    theta: Theta,
    objective: Callable[[Theta], tuple[PerHead, PerHead]],
    step: Callable[[Theta], tuple[Theta, Theta]],
    tolerance: float = 0.0,
) -> Iterator[tuple[Theta, PerHead]]:
    """θ and the objective of each head, step by step, to where a step gains no more than rounding. It never rises.

    Args:
        theta: where to start.
        objective: f and how far rounding may have moved it.
        step: ∇f and what is to be subtracted from θ, positive definite times ∇f; it is halved until f falls (Armijo).
        tolerance: a gain that is not worth another step either.

    Raises:
        ArithmeticError: where that takes too many steps.
    """
    most = current().descent_steps
    value, rounding = objective(theta)
    for _ in range(most):
        gradient, full_step = step(theta)
        decrement = (gradient * full_step).sum(-1)  # twice what a full step is going to gain, in nats
        # The covariance of a saturated head is 0, and what rounding makes of it may be negative: such a head stays.
        full_step = full_step.where(decrement[:, None] > 0, 0.0)
        length = torch.ones_like(decrement)
        while True:
            candidate = theta - length[:, None] * full_step
            reached, noise = objective(candidate)
            too_long = reached > value - 0.1 * length * decrement + rounding
            if not too_long.any():
                break
            length = torch.where(too_long, length / 2, length)
        converged = bool((value - reached <= rounding + tolerance).all())
        theta, value, rounding = candidate, reached, noise
        yield theta, value
        if converged:
            return
    raise ArithmeticError(f"Newton's method did not converge in {most} steps; it stands at θ = {theta.tolist()}")


def objective(theta: Theta, observed: DistanceMass, features: Features) -> tuple[PerHead, PerHead]:
    """f(θ) of each head, and how far rounding may have moved it."""
    bias = theta @ features.T
    log_z = (bias.logcumsumexp(-1) * observed.rows).sum(-1)
    linear = (observed.mass * bias).sum(-1)
    ridge = RIDGE / 2 * theta.square().sum(-1)
    return log_z - linear + ridge, 16 * _EPS * (1 + log_z.abs() + linear.abs())


def derivatives(
    theta: Theta, observed: DistanceMass, features: Features
) -> tuple[Theta, Float64[Tensor, "head feature feature"]]:
    """∇f = E[φ] - observed mean of φ + RIDGE θ, and ∇²f = mean over rows of Cov[φ] + RIDGE · 1.

    Rows are prefixes of one another, so that sums over d ≤ t are cumulative sums along d, and sums over the rows t ≥ d
    that see a distance are cumulative sums from the other end; in logarithms, where nothing over- or underflows.
    """
    log_z, mean = means(theta, features)
    bias = theta @ features.T
    seen = (observed.rows.log() - log_z).flip(-1).logcumsumexp(-1).flip(-1)  # ln Σ_{t ≥ d} rows_t / Z_t
    expected = (bias + seen).exp()  # the template's own mass by distance
    gradient = (expected - observed.mass) @ features + RIDGE * theta
    second = torch.einsum("df,hd,dg->hfg", features, expected, features)
    covariance = second - torch.einsum("hqf,hq,hqg->hfg", mean, observed.rows.expand_as(expected), mean)
    return gradient, covariance + RIDGE * torch.eye(features.shape[1], dtype=second.dtype)


def means(
    theta: Theta, features: Features
) -> tuple[Float64[Tensor, "head query"], Float64[Tensor, "head query feature"]]:
    """ln Z_t, and the template's mean of every feature in each row."""
    bias = theta @ features.T
    log_z = bias.logcumsumexp(-1)
    mean = ((bias[..., None] + features.log()).logcumsumexp(-2) - log_z[..., None]).exp()
    return log_z, mean
