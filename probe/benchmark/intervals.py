"""Coverage: how often an interval holds the truth, on data that were drawn so that the truth is known.

Every simulation calls the very function of the toolkit that prints the interval, on data drawn anew each time. The
truth is a number of the distribution: given in closed form, or measured once on a sample so large that its own error
does not count.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probe.attention import compare_models, compare_to, split_scores
from probe.attention.summary import attention_summary
from probe.benchmark.processes import in_processes
from probe.config import check_size
from probe.errors import unknown_name
from probe.extrapolation import fit_log_law, scale_against
from probe.extrapolation.losses_by_context import ContextLosses, perplexity_rows
from probe.league import league, over_tasks, run_scores
from probe.position.geometry.decomposition import decompose_hidden
from probe.position.geometry.variance import variance_by_position
from probe.position.probes.scores import Draws, r2
from probe.progress import OnProgress, Steps, untold
from probe.statistics import BOTH, Bootstrap, wilson
from probe.tracing import PATTERN, RESID_POST, SCORES, Trace, block_site

CONFIDENCE = 0.95
LENGTH = 8  # tokens of a simulated sequence
LARGE = 20_000  # sequences in the sample that stands for the distribution

# By the name of a number: its interval and the truth.
Found = Mapping[str, tuple[float, float, float]]
Size = Mapping[str, int]


@dataclass(frozen=True)
class Simulation:
    """One interval of the toolkit on data whose truth is known."""

    about: str  #: what the interval is of, in one sentence
    over: str  #: "sequences", "trainings", "both", "tasks", "heads" or "points"
    sizes: Sequence[Size]  #: how many of each there are
    draw: Callable[[np.random.Generator, Size], Found]  #: one data set's intervals, and the truth
    cost: int = 1  #: how many data sets of the cheapest simulation take as long as one of this


def interval_coverage(
    names: Sequence[str] | None = None,
    *,
    n_simulations: int = 2000,
    seed: int = 0,
    jobs: int = 1,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """How often each interval holds the truth, of nominally 0.95.

    Args:
        names: names in ``SIMULATIONS``; by default all.
        n_simulations: data sets of the cheapest simulations; the others draw as many as cost the same, 200 at least.
        seed: of the data; the same seed gives the same rows.
        jobs: processes that simulate side by side.
        on_progress: called with how many simulations and sizes are done, and how many there are.

    Returns:
        Columns simulation, metric, over (what the interval is over), the sizes (n_sequences, n_trainings, n_tasks,
        n_heads, n_points, missing where there is none), value (the coverage), low, high (Wilson's interval of it),
        width (the median width of the intervals), n (data sets).

    Raises:
        ProbeError: for an unknown name, or a number below 1.
    """
    check_size("n_simulations", n_simulations)
    check_size("jobs", jobs)
    for name in names or ():
        if name not in SIMULATIONS:
            raise unknown_name("simulation", name, SIMULATIONS)
    work = [
        (name, size, max(min(200, n_simulations), n_simulations // SIMULATIONS[name].cost), seed)
        for name in names or SIMULATIONS
        for size in SIMULATIONS[name].sizes
    ]
    steps, found = Steps(len(work), on_progress), []
    for rows in in_processes(_covered, work, jobs):
        found.append(rows)
        steps.step()
    columns = ["simulation", "metric", "over", *SIZES, "value", "low", "high", "width", "n"]
    table = pd.concat(found, ignore_index=True).reindex(columns=columns)
    return table.astype({size: "Int64" for size in SIZES})


SIZES = ("n_sequences", "n_trainings", "n_tasks", "n_heads", "n_points")
Work = tuple[str, Size, int, int]


def _covered(work: Work) -> pd.DataFrame:
    """The rows of one simulation at one size."""
    name, size, n, seed = work
    simulation = SIMULATIONS[name]
    # One stream for each simulation and size, whatever else is simulated.
    rng = np.random.default_rng([seed, *name.encode(), *size.values()])
    intervals: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(n):
        for metric, found in simulation.draw(rng, size).items():
            intervals.setdefault(metric, []).append(found)
    rows = []
    for metric, each in intervals.items():
        low, high, truth = np.array(each).T
        held = int(((low <= truth) & (truth <= high)).sum())  # an interval that is missing holds nothing
        below, above = wilson(held, len(each), CONFIDENCE)
        there = np.isfinite(high - low)
        width = float(np.median((high - low)[there])) if there.any() else math.nan
        keys = {"simulation": name, "metric": metric, "over": simulation.over, **size}
        rows.append(keys | {"value": held / len(each), "low": below, "high": above, "width": width, "n": len(each)})
    return pd.DataFrame(rows)


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


# ---- over sequences


def _losses(rng: np.random.Generator, size: Size) -> Found:
    """Losses of texts that differ much: gamma of shape 4, mean 3 nats a token."""
    losses = torch.from_numpy(rng.gamma(4, 0.75, size["n_sequences"]))
    rows = perplexity_rows(ContextLosses({64: losses}, {64: 63}), seed=_seed(rng)).set_index("metric")
    truth = {"loss": 3.0, "perplexity": math.exp(3)}
    return {metric: (rows.loc[metric, "low"], rows.loc[metric, "high"], truth[metric]) for metric in truth}


def _patterns(rng: np.random.Generator, n: int, heads: int, spread: Tensor | float = 1.0) -> Tensor:
    """Patterns of independent sequences and heads: softmax of normal scores about a decay."""
    at = torch.arange(LENGTH)
    decay = -0.3 * (at[:, None] - at).double()
    scores = spread * torch.from_numpy(rng.normal(size=(n, heads, LENGTH, LENGTH))) + decay
    return scores.masked_fill(at > at[:, None], -math.inf).softmax(-1)


def _trace(pattern: Tensor) -> Trace:
    n = len(pattern)
    tokens = torch.arange(n * LENGTH).view(n, LENGTH)  # no sequence is there twice
    return Trace(tokens, torch.full((n,), LENGTH), {block_site(0, PATTERN): pattern}, 1)


def _entropy(rng: np.random.Generator, size: Size) -> Found:
    rows = attention_summary(_trace(_patterns(rng, size["n_sequences"], 1)), seed=_seed(rng))
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
    traces = {"a": _trace(_patterns(rng, n, 4)), "b": _trace(_uniform(n))}
    row = compare_models(traces, seed=_seed(rng)).iloc[-1]
    return {"minimum of 4 heads": (row["low"], row["high"], _distance_from_uniform())}


@functools.cache
def _distance_from_uniform() -> float:
    n = LARGE
    traces = {"a": _trace(_patterns(np.random.default_rng(2), n, 1)), "b": _trace(_uniform(n))}
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
    rows = split_scores(trace, n_bootstrap=n_bootstrap, seed=_seed(rng)).shares
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
    rows = decompose_hidden(_states(rng, size["n_sequences"]), skip=0).shares
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
    bootstrap = Bootstrap.draw(n, 1000, CONFIDENCE, _seed(rng))
    low, high = bootstrap.interval(bootstrap.means(change))
    return {"mean change of a loss": (float(low), float(high), 0.7)}


def _readout(rng: np.random.Generator, size: Size) -> Found:
    """R² of one probe over sequences, each of which is read more or less well."""
    draws = Draws.of(size["n_sequences"], 1000, CONFIDENCE, _seed(rng))
    (found,) = draws.of_models(draws.score(_sums(rng, np.ones((1, 1)), size["n_sequences"]), r2))
    return {"r2": (found.low, found.high, 1 - ERROR / VARIANCE)}


# ---- over trainings


VARIANCE = (LENGTH**2 - 1) / 12  # of the positions 0…LENGTH - 1
ERROR = 1.0  # the mean squared error of a probe


def _sums(rng: np.random.Generator, of_model: np.ndarray, sequences: int) -> Tensor:
    """What ``probe.position.probes.scores.token_sums`` makes of probes whose errors are so many times ``ERROR``, and
    differ from sequence to sequence."""
    y, models = np.arange(LENGTH) - (LENGTH - 1) / 2, len(of_model)
    squares = ERROR * of_model * rng.gamma(8, 1 / 8, (1, sequences)) * rng.chisquare(LENGTH, (models, sequences))
    sums = np.zeros((models, sequences, 1, 6))
    sums[..., 0, 0], sums[..., 0, 2], sums[..., 0, 3] = LENGTH, (y**2).sum(), squares
    return torch.from_numpy(sums)


def _probes(rng: np.random.Generator, size: Size) -> Found:
    n, of_model = size["n_sequences"], rng.gamma(6, 1 / 6, (size["n_trainings"], 1))
    draws = Draws.of(n, 200, CONFIDENCE, _seed(rng))
    (found,) = draws.of_models(draws.score(_sums(rng, of_model, n), r2))
    return {"r2": (found.low, found.high, 1 - ERROR / VARIANCE)}


def _trainings(rng: np.random.Generator, n_trainings: int, noise: Tensor, mean: float) -> list[Trace]:
    """Trainings of a model: the same sequences, seen with a strength of its own by each."""
    at = torch.arange(LENGTH)
    decay = (at[:, None] - at).clamp(min=0).double()
    traces = []
    for strength in rng.normal(mean, 0.25, n_trainings):
        scores = (noise - strength * decay).masked_fill(at > at[:, None], -math.inf)
        traces.append(_trace(scores.softmax(-1)))
    return traces


def _noise(rng: np.random.Generator, n: int) -> Tensor:
    return torch.from_numpy(rng.normal(size=(n, 1, LENGTH, LENGTH)))


MEANS = {"a": 0.2, "b": 0.8, "c": 1.0}


def _models(rng: np.random.Generator, size: Size) -> Found:
    n, k = size["n_sequences"], size["n_trainings"]
    noise = _noise(rng, n)
    traces = {name: _trainings(rng, k, noise, mean) for name, mean in MEANS.items()}
    rows = compare_models({"a": traces["a"], "b": traces["b"]}, seed=_seed(rng)).query("scope == 'mean'")
    rows = rows.set_index(["model_a", "model_b"])
    order = compare_to(traces, "a", seed=_seed(rng)).iloc[0]
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


# ---- over tasks, heads and points


ENCODINGS = ("none", "alibi", "t5")


def _table(rng: np.random.Generator, n_tasks: int, n_trainings: int) -> pd.DataFrame:
    """Accuracies of encodings none of which is better over tasks, though each task likes some of them."""
    liking = rng.normal(0, 0.15, (n_tasks, 1, len(ENCODINGS)))
    accuracy = (0.5 + liking + rng.normal(0, 0.05, (n_tasks, n_trainings, len(ENCODINGS)))).clip(0, 1)
    index = pd.MultiIndex.from_product(
        [[f"task {i}" for i in range(n_tasks)], range(n_trainings), ENCODINGS], names=["task", "seed", "encoding"]
    )
    return pd.DataFrame({"accuracy": accuracy.ravel()}, index=index).reset_index().assign(length=pd.NA)


def _league(rng: np.random.Generator, size: Size) -> Found:
    results = _table(rng, size["n_tasks"], size["n_trainings"]).astype({"length": "Int64"})
    rows = league(results, by="overall")
    rank = rows[(rows["metric"] == "mean_reciprocal_rank") & (rows["encoding"] == "none")].iloc[0]
    scores = run_scores(results, by="overall")
    difference = over_tasks(scores["none"] - scores["t5"], CONFIDENCE)
    # Each encoding is first, second and third equally often: (1 + 1/2 + 1/3) / 3.
    return {
        "mean_reciprocal_rank": (rank["low"], rank["high"], 11 / 18),
        "difference of accuracy": (difference.low, difference.high, 0.0),
    }


CORRELATION = 0.5


def _correlations(rng: np.random.Generator, size: Size) -> Found:
    x, noise = rng.normal(size=(2, size["n_heads"]))
    rows = scale_against(x, CORRELATION * x + math.sqrt(1 - CORRELATION**2) * noise).set_index("metric")
    # Spearman's of a normal pair: 6/π arcsin(r/2).
    truth = {"pearson": CORRELATION, "spearman": 6 / math.pi * math.asin(CORRELATION / 2)}
    return {metric: (*rows.loc[metric, ["low", "high"]], truth[metric]) for metric in truth}


def _law(rng: np.random.Generator, size: Size) -> Found:
    """Scales at the trained length, where λ is 1 by construction, and at as many others as there are points."""
    extensions = np.array([1.0] + [2.0 ** (1 + i % 4) for i in range(size["n_points"])])
    scales = 1 + 0.4 * np.log(extensions) + 0.05 * rng.normal(size=len(extensions)) * (extensions > 1)
    law = fit_log_law(extensions.tolist(), scales.tolist())
    return {"slope": (law.low, law.high, 0.4)}


def _sizes(**each: Sequence[int]) -> list[Size]:
    """The first of each, the second of each, …"""
    return [dict(zip(each, values, strict=True)) for values in zip(*each.values(), strict=True)]


#: By name: what is simulated.
SIMULATIONS: dict[str, Simulation] = {
    "losses": Simulation(
        "Loss and perplexity over texts, gamma distributed.", "sequences", _sizes(n_sequences=(5, 10, 20, 50)), _losses
    ),
    "changes": Simulation(
        "The mean change of a loss over sequences, as ablations and erasure have it.",
        *("sequences", _sizes(n_sequences=(5, 10, 20, 50)), _paired_means),
    ),
    "readout": Simulation(
        "R² of one probe over test sequences.", "sequences", _sizes(n_sequences=(5, 10, 20, 50)), _readout
    ),
    "entropy": Simulation(
        "The entropy of a head's attention.", "sequences", _sizes(n_sequences=(10, 20, 50)), _entropy, cost=4
    ),
    "nearest_heads": Simulation(
        "The distance of the nearest of four equal heads.", "sequences", _sizes(n_sequences=(10, 20, 50)), _nearest, 4
    ),
    "split": Simulation(
        "The split of scores, within rows.", "sequences", _sizes(n_sequences=(10, 20, 50)), _split_shares, cost=10
    ),
    "share_position": Simulation(
        "The share of position in hidden states.", "sequences", _sizes(n_sequences=(10, 20, 80)), _share_position, 10
    ),
    "exponent": Simulation(
        "The exponent with which variance falls.", "sequences", _sizes(n_sequences=(10, 20, 50)), _exponent, cost=10
    ),
    "probes": Simulation(
        "R² of probes of several trainings.",
        *("both", _sizes(n_trainings=(2, 3, 5, 10), n_sequences=(20, 20, 20, 20)), _probes),
    ),
    "models": Simulation(
        "The distance of models of several trainings, and its difference to a reference.",
        *("both", _sizes(n_trainings=(2, 3, 5, 10), n_sequences=(20, 20, 20, 20)), _models, 40),
    ),
    "league": Simulation(
        "Ranks and differences of encodings over tasks.",
        *("tasks", _sizes(n_tasks=(4, 8, 12), n_trainings=(2, 3, 3)), _league, 10),
    ),
    "correlations": Simulation(
        "Correlations over heads.", "heads", _sizes(n_heads=(8, 12, 24)), _correlations, cost=10
    ),
    "law": Simulation("The slope of λ over ln s.", "points", _sizes(n_points=(2, 3, 6, 12)), _law),
}
