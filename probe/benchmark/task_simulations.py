"""Simulations of intervals over tasks, over heads and over the points of a line."""

import math

import numpy as np
import pandas as pd

from probe.benchmark.simulation import CONFIDENCE, Found, Simulation, Size, sizes_of
from probe.extrapolation import fit_log_law, scale_against
from probe.league import league, over_tasks, run_scores

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


#: The simulations of this file, by name.
SIMULATIONS: dict[str, Simulation] = {
    "league": Simulation(
        "Ranks and differences of encodings over tasks.",
        *("tasks", sizes_of(n_tasks=(4, 8, 12), n_trainings=(2, 3, 3)), _league, 10),
    ),
    "correlations": Simulation(
        "Correlations over heads.", "heads", sizes_of(n_heads=(8, 12, 24)), _correlations, cost=10
    ),
    "law": Simulation("The slope of λ over ln s.", "points", sizes_of(n_points=(2, 3, 6, 12)), _law),
}
