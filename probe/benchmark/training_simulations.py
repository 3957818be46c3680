"""Simulations of intervals over trainings of a model, and over their sequences."""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from probe.attention import compare_models, compare_to
from probe.benchmark.simulation import (
    CONFIDENCE,
    ERROR,
    LENGTH,
    VARIANCE,
    Found,
    Simulation,
    Size,
    drawn_seed,
    sizes_of,
    sums_of_probes,
    trace_of,
)
from probe.position.probes.scores import Draws, r2
from probe.statistics import BOTH
from probe.tracing import Trace


def _probes(rng: np.random.Generator, size: Size) -> Found:
    n, of_model = size["n_sequences"], rng.gamma(6, 1 / 6, (size["n_trainings"], 1))
    draws = Draws.of(n, 200, CONFIDENCE, drawn_seed(rng))
    (found,) = draws.of_models(draws.score(sums_of_probes(rng, of_model, n), r2))
    return {"r2": (found.low, found.high, 1 - ERROR / VARIANCE)}


def _trainings(rng: np.random.Generator, n_trainings: int, noise: Tensor, mean: float) -> list[Trace]:
    """Trainings of a model: the same sequences, seen with a strength of its own by each."""
    at = torch.arange(LENGTH)
    decay = (at[:, None] - at).clamp(min=0).double()
    traces = []
    for strength in rng.normal(mean, 0.25, n_trainings):
        scores = (noise - strength * decay).masked_fill(at > at[:, None], -math.inf)
        traces.append(trace_of(scores.softmax(-1)))
    return traces


def _noise(rng: np.random.Generator, n: int) -> Tensor:
    return torch.from_numpy(rng.normal(size=(n, 1, LENGTH, LENGTH)))


MEANS = {"a": 0.2, "b": 0.8, "c": 1.0}


def _models(rng: np.random.Generator, size: Size) -> Found:
    n, k = size["n_sequences"], size["n_trainings"]
    noise = _noise(rng, n)
    traces = {name: _trainings(rng, k, noise, mean) for name, mean in MEANS.items()}
    rows = compare_models({"a": traces["a"], "b": traces["b"]}, seed=drawn_seed(rng)).query("scope == 'mean'")
    rows = rows.set_index(["model_a", "model_b"])
    order = compare_to(traces, "a", seed=drawn_seed(rng)).iloc[0]
    sign = 1 if order["model_a"] == "b" else -1
    low, high = sorted((sign * order["low"], sign * order["high"]))
    truth, pairs = _true_distances(), {"two models": ("a", "b"), "a model with itself": ("a", "a")}
    found = {
        what: (*rows.loc[pair, ["low", "high"]], truth[pair])
        for what, pair in pairs.items()
        if rows.loc[pair, "interval"] == BOTH  # of two trainings with each other there is only one pair
    }
    return found | {"difference to a reference": (low, high, truth["a", "b"] - truth["a", "c"])}


@functools.cache
def _true_distances() -> dict[tuple[str, str], float]:
    """Over many trainings, each with sequences of its own."""
    rng, n = np.random.default_rng(4), 3000
    total = dict.fromkeys([("a", "b"), ("a", "c"), ("a", "a")], 0.0)
    for _ in range(n):
        noise = _noise(rng, 4)
        for x, y in total:
            p, q = _trainings(rng, 1, noise, MEANS[x]), _trainings(rng, 1, noise, MEANS[y])
            total[x, y] += float(compare_models({"p": p[0], "q": q[0]}, n_bootstrap=1)["value"].iloc[-1]) / n
    return total


#: The simulations of this file, by name.
SIMULATIONS: dict[str, Simulation] = {
    "probes": Simulation(
        "R² of probes of several trainings.",
        *("both", sizes_of(n_trainings=(2, 3, 5, 10), n_sequences=(20, 20, 20, 20)), _probes),
    ),
    "models": Simulation(
        "The distance of models of several trainings, and its difference to a reference.",
        *("both", sizes_of(n_trainings=(2, 3, 5, 10), n_sequences=(20, 20, 20, 20)), _models, 40),
    ),
}
