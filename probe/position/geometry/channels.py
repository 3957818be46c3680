"""The single coordinates of hidden states that go with position."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from probe.errors import ProbeError
from probe.position.geometry.states import moved_interval, spearman, states_at
from probe.position.probes.scores import Draws
from probe.statistics import N_BOOTSTRAP
from probe.tracing import Trace


def position_channels(
    trace: Trace,
    sites: Sequence[str] | None = None,
    *,
    untrained: Trace | None = None,
    top: int = 8,
    skip: int = 1,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The single coordinates of hidden states that go with position.

    The ``top`` coordinates of a site, by the size of their first metric:

    - "spearman": Spearman's correlation of the coordinate with the position within a sequence, averaged over
      sequences, in [-1, 1]; 0 for a coordinate that is constant;
    - "monotone": the share of steps t → t + 1 at which the coordinate's mean over sequences goes that way, in [0, 1].

    The best of many coordinates is good by chance, too: the shuffled control chooses its own best ones.

    Returns:
        Columns site, control, rank (0 is the best), channel, metric, value, low, high, n (sequences).

    Raises:
        ProbeError: as ``decompose_hidden``, and for sequences of fewer than three positions after ``skip``.
    """
    parts = []
    for states in states_at(trace, sites, untrained, skip, seed):
        lengths = states.present.sum(1).tolist()
        if min(lengths) < 3:
            raise ProbeError(f"channels want at least {skip + 3} positions a sequence, got {min(lengths) + skip}")
        rho = np.stack([
            spearman(x[:n].numpy(), np.arange(n)[:, None], axis=0) for x, n in zip(states.x, lengths, strict=True)
        ])  # fmt: skip
        draws = Draws.of(len(rho), n_bootstrap, confidence, seed)
        best = torch.from_numpy(-np.abs(rho.mean(0))).argsort(stable=True)[:top]
        correlation = (draws.sequences @ torch.from_numpy(rho)[:, best]) / len(rho)
        of_best = dataclasses.replace(states, x=states.x[..., best])
        steps = torch.stack([of_best.means(times).diff(dim=0) for times in draws.sequences])
        monotone = (steps * correlation[:1, None].sign() > 0).sum(1).double() / (~steps.isnan()).sum(1)
        for metric, stack in (("spearman", correlation), ("monotone", monotone)):
            keys = {"site": states.site, "control": states.control, "rank": range(len(best)), "channel": best.numpy()}
            parts.append(pd.DataFrame(keys | {"metric": metric} | moved_interval(draws, stack, -1, 1)))
    return pd.concat(parts, ignore_index=True)
