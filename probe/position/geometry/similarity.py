"""How alike hidden states are that stand near each other."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from probe.errors import ProbeError
from probe.position.geometry.states import States, moved_interval, spearman, states_at
from probe.position.probes.scores import Draws
from probe.statistics import N_BOOTSTRAP
from probe.tracing import Trace


def neighbour_similarity(
    trace: Trace,
    sites: Sequence[str] | None = None,
    *,
    untrained: Trace | None = None,
    max_lag: int | None = None,
    skip: int = 1,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """How alike hidden states k positions apart are. Zuo et al. 2025.

    Metrics, by lag k = 1…max_lag (half of the positions by default, as larger lags have few pairs):

    - "hidden": the mean of cos(h_t, h_{t+k}) over all such pairs within sequences, in [-1, 1];
    - "position_mean": that of cos(pos_t, pos_{t+k}), pos_t the mean over sequences less its mean over positions;

    and "hidden_spearman", "position_mean_spearman" (no lag): Spearman's correlation of these means with -k, in [-1, 1],
    1 where similarity falls at every step. Two means that differ by nothing but noise have ranks, too: read it beside
    its controls and the curve.

    Returns:
        Columns site, control, lag, metric, value, low, high, n (sequences).

    Raises:
        ProbeError: as ``decompose_hidden``, and for a ``max_lag`` that no sequence reaches.
    """
    parts = []
    for states in states_at(trace, sites, untrained, skip, seed):
        n_pos = int(states.present.sum(1).max())
        last = max(1, n_pos // 2) if max_lag is None else max_lag
        if not 1 <= last < n_pos:
            raise ProbeError(f"max_lag must lie in 1…{n_pos - 1}, what the longest sequence has, got {max_lag}")
        draws = Draws.of(len(states.x), n_bootstrap, confidence, seed)
        lags = range(1, last + 1)
        unit = torch.nn.functional.normalize(states.x, dim=-1)
        pairs = torch.stack([(states.present[:, k:] & states.present[:, :-k]).sum(1).double() for k in lags], 1)
        alike = torch.stack([(unit[:, k:] * unit[:, :-k]).sum((1, 2)) for k in lags], 1)
        curves = {
            "hidden": (draws.sequences @ alike) / (draws.sequences @ pairs),
            "position_mean": torch.stack([_mean_similarity(states, times, lags) for times in draws.sequences]),
        }
        for metric, scores in curves.items():
            falls = spearman(scores.numpy().round(12), -np.arange(last)[None], axis=1)  # not the ranks of rounding
            for name, lag, stack in (
                (metric, [*lags], scores),
                (f"{metric}_spearman", [pd.NA], torch.from_numpy(falls)[:, None]),
            ):
                keys = {"site": states.site, "control": states.control, "lag": pd.array(lag, dtype="Int64")}
                parts.append(pd.DataFrame(keys | {"metric": name} | moved_interval(draws, stack, -1, 1)))
    return pd.concat(parts, ignore_index=True)


def _mean_similarity(states: States, times: Float64[Tensor, "batch"], lags: range) -> Float64[Tensor, "lag"]:
    seen = (times @ states.present.double()) > 0
    means = states.means(times)[seen]
    unit = torch.nn.functional.normalize(means - means.mean(0), dim=-1)
    cosines = unit @ unit.T
    return torch.stack([cosines.diagonal(k).mean() for k in lags])  # NaN where no pair was drawn
