"""Coverage: how often an interval holds the truth, on data that were drawn so that the truth is known.

Every simulation calls the very function of the toolkit that prints the interval, on data drawn anew each time. The
truth is a number of the distribution: given in closed form, or measured once on a sample so large that its own error
does not count.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from probe.benchmark import sequence_simulations, task_simulations, training_simulations
from probe.benchmark.processes import in_processes
from probe.benchmark.simulation import CONFIDENCE, Simulation, Size
from probe.config import check_size
from probe.errors import unknown_name
from probe.progress import OnProgress, Steps, untold
from probe.statistics import wilson

#: By name: what is simulated.
SIMULATIONS: dict[str, Simulation] = {
    **sequence_simulations.SIMULATIONS,
    **training_simulations.SIMULATIONS,
    **task_simulations.SIMULATIONS,
}

SIZES = ("n_sequences", "n_trainings", "n_tasks", "n_heads", "n_points")
Work = tuple[str, Size, int, int]


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
