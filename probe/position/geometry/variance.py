"""How the variance of attention outputs changes with the position."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from probe.errors import ProbeError
from probe.position.geometry.states import States, moved_interval, states_at
from probe.position.probes.scores import Draws
from probe.statistics import N_BOOTSTRAP
from probe.tracing import Trace

ATTENTION_OUT = "hook_attn_out"
LIMITS = {"variance": (0, np.inf), "exponent": (-np.inf, np.inf), "exponent_r2": (0, 1)}


def variance_by_position(
    trace: Trace,
    sites: Sequence[str] | None = None,
    *,
    untrained: Trace | None = None,
    skip: int = 1,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The variance of attention outputs against the number of keys t + 1. Chi et al. 2023: it shrinks, untrained, too.

    Metrics:

    - "variance", by position: over sequences, without bias, averaged over coordinates; unit of the site squared;
    - "exponent" (no position): a of the fit ln variance = b - a ln(t + 1), by least squares over the positions that
      have a variance: 1 for the mean of t + 1 independent values, 0 for a single key, NaN where nothing varies;
    - "exponent_r2": R² of that fit, NaN where the variance is the same everywhere.

    Args:
        sites: full names; by default ``hook_attn_out`` of every layer in the trace. Of a site with heads
            (``attn.hook_z``) each head has its own rows.

    Returns:
        Columns site, head (missing where the site has none), control, position, metric, value, low, high, n
        (sequences).

    Raises:
        ProbeError: as ``decompose_hidden``; the shuffled control is left out.
    """
    if sites is None:
        sites = [site for site in trace.values if site.endswith(ATTENTION_OUT)]
        if not sites:
            raise ProbeError(f"the variance of attention outputs wants a trace at {ATTENTION_OUT!r}, got none of it")
    parts = []
    for site in sites:
        for head in range(trace[site].shape[2]) if trace[site].ndim == 4 else [None]:
            for states in states_at(trace, [site], untrained, skip, seed, shuffled=False, head=head):
                draws = Draws.of(len(states.x), n_bootstrap, confidence, seed)
                scores = _variances(states, draws.sequences)
                t = torch.arange(scores.shape[1]) + skip
                keys = {"site": site, "head": pd.array([head], dtype="Int64")[0], "control": states.control}
                stacks = {"variance": scores, **_power_law(scores, (t + 1.0).double())}
                for metric, stack in stacks.items():
                    position = pd.array(t.tolist() if metric == "variance" else [pd.NA], dtype="Int64")
                    least, most = LIMITS[metric]
                    numbers = moved_interval(draws, stack, least, most)
                    parts.append(pd.DataFrame(keys | {"position": position, "metric": metric} | numbers))
    return pd.concat(parts, ignore_index=True).astype({"head": "Int64"})


def _variances(states: States, times: Float64[Tensor, "draw batch"]) -> Float64[Tensor, "draw pos"]:
    """The variance at each position in each draw, 0 where rounding made it; NaN of fewer than two sequences."""
    found = []
    for t in range(states.x.shape[1]):
        seen = states.present[:, t]
        x, drawn = states.x[seen, t], times[:, seen]
        count = drawn.sum(1)
        # About the sample's own mean: squares of what is left, and no cancellation.
        x = x - x.mean(0)
        squares = drawn @ x.square().mean(1) - ((drawn @ x).square().mean(1) / count.clamp(min=1))
        variance = squares / (count - 1).clamp(min=1)
        variance = torch.where(variance > states.rounding, variance, 0.0)
        found.append(torch.where(count > 1, variance, torch.nan))
    return torch.stack(found, dim=1)


def _power_law(
    variance: Float64[Tensor, "draw pos"], t: Float64[Tensor, "pos"]
) -> dict[str, Float64[Tensor, "draw 1"]]:
    """The exponent of variance ∝ t^-a and its R², over positions that have a variance."""
    real = variance > 0
    y = torch.where(real, variance, 1.0).log()
    x, n = t.log().expand_as(y), real.sum(1, keepdim=True)
    x, y = (torch.where(real, z - (z * real).sum(1, keepdim=True) / n, 0.0) for z in (x, y))
    slope = (x * y).sum(1, keepdim=True) / x.square().sum(1, keepdim=True)
    spread = y.square().sum(1, keepdim=True)
    r2 = 1 - (y - slope * x).square().sum(1, keepdim=True) / spread.where(spread > 1e-24, torch.nan)
    return {name: torch.where(n > 1, z, torch.nan) for name, z in (("exponent", -slope), ("exponent_r2", r2))}
