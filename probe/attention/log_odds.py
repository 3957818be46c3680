"""The best log-odds of a favoured group of keys: what window, sink and their like have for a parameter.

In row t, g_t of the t + 1 visible keys are favoured: their scores are θ, all others 0. So each favoured key has weight
e^θ/Z_t and each other 1/Z_t, with Z_t = g_t e^θ + t + 1 - g_t.
"""

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from probe.attention.distance_family import RIDGE
from probe.limits import current

_HIGHEST = 40.0  # beyond any optimum: there the ridge pulls by RIDGE · 40, and the attention lacks T e⁻⁴⁰ of 1
_STEP = 1e-6  # Newton's last step: its square is what θ is off by, or the rounding of a saturated head's slope


def fit_log_odds(
    favoured: Int[Tensor, "#*group query"], rows: Float64[Tensor, "#*group query"], mass: Float64[Tensor, "*group"]
) -> tuple[Float64[Tensor, "*group"], Float64[Tensor, "*group"]]:
    """The θ that minimises the mean over observed rows of KL(observed row ‖ template row), and what it leaves there.

    Without the observed rows' own entropy and with the ridge of ``distance_family.fit`` the objective is

        f(θ) = Σ_t rows_t ln Z_t(θ) - mass θ + ½ RIDGE θ²,

    and f′ rises strictly from below 0 to above it: its zero is found by Newton's method, kept inside a bracket that
    every step narrows, until θ hardly moves.

    Args:
        favoured: g_t, the number of visible keys that are favoured in row t; rows without any, or with nothing else,
            are the same for every θ.
        rows: the share of the rows that are rows t.
        mass: the attention paid to favoured keys, as a mean over rows.

    Returns:
        θ, between about -25 and 25 where all or none of the attention is on favoured keys; and f(θ), in nats.
    """
    others = torch.arange(1, favoured.shape[-1] + 1) - favoured
    # Of a row's attention, favoured keys get sigmoid(θ + prior_t); the prior is infinite where nothing else is visible.
    prior = favoured.double().log() - others.double().log()
    theta = torch.zeros_like(mass)
    low, high = torch.full_like(mass, -_HIGHEST), torch.full_like(mass, _HIGHEST)
    for _ in range(current().log_odds_steps):
        share = torch.sigmoid(theta[..., None] + prior)
        weighted = rows * share
        slope = weighted.sum(-1) - mass + RIDGE * theta
        curvature = (weighted * (1 - share)).sum(-1) + RIDGE
        low, high = torch.where(slope < 0, theta, low), torch.where(slope < 0, high, theta)
        newton = theta - slope / curvature
        moved = newton.where((newton >= low) & (newton <= high), (low + high) / 2)
        step, theta = (moved - theta).abs().max(), moved
        if step < _STEP:
            break
    ln_z = torch.logaddexp(theta[..., None] + favoured.double().log(), others.double().log())
    return theta, (rows * ln_z).sum(-1) - mass * theta + RIDGE / 2 * theta.square()
