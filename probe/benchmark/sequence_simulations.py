"""Simulations of intervals over sequences."""

import functools
import math

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probe.attention import compare_models, split_scores
from probe.attention.summary import attention_summary
from probe.benchmark.simulation import (
    CONFIDENCE,
    ERROR,
    LARGE,
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
from probe.extrapolation.losses_by_context import ContextLosses, perplexity_rows
from probe.position.geometry.decomposition import decompose_hidden
from probe.position.geometry.variance import variance_by_position
from probe.position.probes.scores import Draws, r2
from probe.statistics import Bootstrap
from probe.tracing import RESID_POST, SCORES, Trace, block_site


def _losses(rng: np.random.Generator, size: Size) -> Found:
    """Losses of texts that differ much: gamma of shape 4, mean 3 nats a token."""
    losses = torch.from_numpy(rng.gamma(4, 0.75, size["n_sequences"]))
    rows = perplexity_rows(ContextLosses({64: losses}, {64: 63}), seed=drawn_seed(rng)).set_index("metric")
    truth = {"loss": 3.0, "perplexity": math.exp(3)}
    return {metric: (rows.loc[metric, "low"], rows.loc[metric, "high"], truth[metric]) for metric in truth}


def _patterns(rng: np.random.Generator, n: int, heads: int, spread: Tensor | float = 1.0) -> Tensor:
    """Patterns of independent sequences and heads: softmax of normal scores about a decay."""
    at = torch.arange(LENGTH)
    decay = -0.3 * (at[:, None] - at).double()
    scores = spread * torch.from_numpy(rng.normal(size=(n, heads, LENGTH, LENGTH))) + decay
    return scores.masked_fill(at > at[:, None], -math.inf).softmax(-1)


def _entropy(rng: np.random.Generator, size: Size) -> Found:
    rows = attention_summary(trace_of(_patterns(rng, size["n_sequences"], 1)), seed=drawn_seed(rng))
    row = rows[(rows["metric"] == "entropy") & (rows["query"] == LENGTH - 1)].iloc[0]
    return {"entropy": (row["low"], row["high"], _mean_entropy())}


@functools.cache
def _mean_entropy() -> float:
    pattern = _patterns(np.random.default_rng(1), 10 * LARGE, 1)[:, 0, -1]
    return float(torch.special.entr(pattern).sum(-1).mean())


def _uniform(n: int) -> Tensor:
    pattern = torch.ones(n, 1, LENGTH, LENGTH, dtype=torch.float64).tril()
    return pattern / pattern.sum(-1, keepdim=True)


def _nearest(rng: np.random.Generator, size: Size) -> Found:
    """Four exchangeable heads beside uniform attention: whichever is the nearest, its distance is that of any."""
    n = size["n_sequences"]
    traces = {"a": trace_of(_patterns(rng, n, 4)), "b": trace_of(_uniform(n))}
    row = compare_models(traces, seed=drawn_seed(rng)).iloc[-1]
    return {"minimum of 4 heads": (row["low"], row["high"], _distance_from_uniform())}


@functools.cache
def _distance_from_uniform() -> float:
    n = LARGE
    traces = {"a": trace_of(_patterns(np.random.default_rng(2), n, 1)), "b": trace_of(_uniform(n))}
    return float(compare_models(traces, n_bootstrap=1)["value"].iloc[-1])


def _scores(rng: np.random.Generator, n: int) -> Tensor:
    """Scores of a relative bias, content, and how much of either a sequence has."""
    at = torch.arange(LENGTH)
    distance = (at[:, None] - at).clamp(min=0).double()
    strength = torch.from_numpy(rng.gamma(8, 1 / 8, (n, 1, 1, 1)))
    content = torch.from_numpy(rng.normal(size=(n, 1, LENGTH, LENGTH)))
    return (-0.4 * strength * distance + content).masked_fill(at > at[:, None], -math.inf)


def _split(rng: np.random.Generator, n: int, n_bootstrap: int) -> pd.DataFrame:
    scores = _scores(rng, n)
    tokens = torch.arange(n * LENGTH).view(n, LENGTH)
    trace = Trace(tokens, torch.full((n,), LENGTH), {block_site(0, SCORES): scores}, 1)
    rows = split_scores(trace, n_bootstrap=n_bootstrap, seed=drawn_seed(rng)).rows
    return rows[rows["scope"] == "seen"].set_index(["part", "metric"])


SPLIT = (("distance", "share"), ("distance", "toeplitz_r2"), ("residual", "share"), ("distance", "slope"))


def _split_shares(rng: np.random.Generator, size: Size) -> Found:
    rows, truth = _split(rng, size["n_sequences"], 1000), _true_shares()
    return {f"{metric} of {part}": (*rows.loc[(part, metric), ["low", "high"]], truth[part, metric])
            for part, metric in SPLIT}  # fmt: skip


@functools.cache
def _true_shares() -> dict[tuple[str, str], float]:
    rng = np.random.default_rng(3)
    each = [_split(rng, LARGE // 10, 1)["value"] for _ in range(20)]
    return {key: float(np.mean([rows.loc[key] for rows in each])) for key in SPLIT}


POSITION = 0.5  # the standard deviation of position's part, where that of a token is 1


def _states(rng: np.random.Generator, n: int) -> Trace:
    """A part by position, one by sequence and one by token, in 4 dimensions."""
    t = torch.arange(LENGTH, dtype=torch.float64)
    along = POSITION * math.sqrt(2) * torch.cos(2 * math.pi * t / LENGTH)  # of mean 0 and that deviation
    x = torch.from_numpy(rng.normal(size=(n, LENGTH, 4)) + rng.normal(size=(n, 1, 4)))
    x[..., 0] += 2 * along  # in one of four dimensions
    tokens = torch.arange(n * LENGTH).view(n, LENGTH)
    return Trace(tokens, torch.full((n,), LENGTH), {block_site(0, RESID_POST): x}, 1)


def _share_position(rng: np.random.Generator, size: Size) -> Found:
    rows = decompose_hidden(_states(rng, size["n_sequences"]), skip=0).rows
    row = rows[(rows["metric"] == "share_position") & (rows["control"] == "none")].iloc[0]
    # Of the variance in four dimensions: position's 4 POSITION², the sequence's 4, the token's 4.
    return {"share_position": (row["low"], row["high"], 4 * POSITION**2 / (4 * POSITION**2 + 8))}


def _exponent(rng: np.random.Generator, size: Size) -> Found:
    """Means of t + 1 independent values: their variance falls as 1/(t + 1)."""
    n = size["n_sequences"]
    x = torch.from_numpy(rng.normal(size=(n, 2 * LENGTH, 16)))
    x = x.cumsum(1) / torch.arange(1, 2 * LENGTH + 1)[:, None]
    site = "blocks.0.hook_attn_out"
    trace = Trace(torch.arange(n * 2 * LENGTH).view(n, -1), torch.full((n,), 2 * LENGTH), {site: x}, 1)
    rows = variance_by_position(trace, skip=1)
    row = rows[rows["metric"] == "exponent"].iloc[0]
    return {"exponent": (row["low"], row["high"], 1.0)}


def _paired_means(rng: np.random.Generator, size: Size) -> Found:
    """The mean change of a loss, as ablations and erasure have it: skewed, and 0 for many a sequence."""
    n = size["n_sequences"]
    change = torch.from_numpy(rng.gamma(1, 1, n) * (rng.random(n) < 0.7))
    bootstrap = Bootstrap.draw(n, 1000, CONFIDENCE, drawn_seed(rng))
    low, high = bootstrap.interval(bootstrap.means(change))
    return {"mean change of a loss": (float(low), float(high), 0.7)}


def _readout(rng: np.random.Generator, size: Size) -> Found:
    """R² of one probe over sequences, each of which is read more or less well."""
    draws = Draws.of(size["n_sequences"], 1000, CONFIDENCE, drawn_seed(rng))
    (found,) = draws.of_models(draws.score(sums_of_probes(rng, np.ones((1, 1)), size["n_sequences"]), r2))
    return {"r2": (found.low, found.high, 1 - ERROR / VARIANCE)}


#: The simulations of this file, by name.
SIMULATIONS: dict[str, Simulation] = {
    "losses": Simulation(
        "Loss and perplexity over texts, gamma distributed.",
        "sequences",
        sizes_of(n_sequences=(5, 10, 20, 50)),
        _losses,
    ),
    "changes": Simulation(
        "The mean change of a loss over sequences, as ablations and erasure have it.",
        *("sequences", sizes_of(n_sequences=(5, 10, 20, 50)), _paired_means),
    ),
    "readout": Simulation(
        "R² of one probe over test sequences.", "sequences", sizes_of(n_sequences=(5, 10, 20, 50)), _readout
    ),
    "entropy": Simulation(
        "The entropy of a head's attention.", "sequences", sizes_of(n_sequences=(10, 20, 50)), _entropy, cost=4
    ),
    "nearest_heads": Simulation(
        "The distance of the nearest of four equal heads.", "sequences", sizes_of(n_sequences=(10, 20, 50)), _nearest, 4
    ),
    "split": Simulation(
        "The split of scores, within rows.", "sequences", sizes_of(n_sequences=(10, 20, 50)), _split_shares, cost=10
    ),
    "share_position": Simulation(
        "The share of position in hidden states.", "sequences", sizes_of(n_sequences=(10, 20, 80)), _share_position, 10
    ),
    "exponent": Simulation(
        "The exponent with which variance falls.", "sequences", sizes_of(n_sequences=(10, 20, 50)), _exponent, cost=10
    ),
}
