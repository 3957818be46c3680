"""How often does a league call a difference real where there is none? Two rules, on simulated tables.

In these tables no encoding is better than another over tasks, though each task favours some of them: what an encoding
gains on a task is normal with a standard deviation of .15, and what a training adds to that is normal with .05.

python docs/generalization/rules.py FILE.parquet    # two minutes on one CPU core
"""

import sys

import numpy as np
import pandas as pd

from probe.statistics import holm, wilson
from probe.training import paired_differences

ENCODINGS = ("none", "t5", "alibi")
SIZES = ((4, 3), (12, 3))
P_VALUES = {"tasks": "p_tasks", "runs": "p_runs"}


def simulated(rng: np.random.Generator, n_tasks: int, n_trainings: int) -> pd.DataFrame:
    """Accuracies by task, seed and encoding, as the league reads them."""
    favoured = rng.normal(0, 0.15, (n_tasks, 1, len(ENCODINGS)))
    accuracy = (0.5 + favoured + rng.normal(0, 0.05, (n_tasks, n_trainings, len(ENCODINGS)))).clip(0, 1)
    keys = [[f"task {i}" for i in range(n_tasks)], range(n_trainings), ENCODINGS]
    index = pd.MultiIndex.from_product(keys, names=["task", "seed", "encoding"])
    rows = pd.DataFrame({"accuracy": accuracy.ravel()}, index=index).reset_index()
    return rows.assign(length=pd.Series(pd.NA, rows.index, dtype="Int64"))


def measure(n_tables: int = 200) -> pd.DataFrame:
    """For each size and rule, the share of tables in which some pair of encodings is called different, corrected for
    all pairs, at .05; with Wilson's interval."""
    parts = []
    for n_tasks, n_trainings in SIZES:
        rng = np.random.default_rng(0)
        tables = [
            paired_differences(simulated(rng, n_tasks, n_trainings), by="overall", seed=i) for i in range(n_tables)
        ]
        for over, column in P_VALUES.items():
            called = sum(bool((holm(table[column].to_numpy()) < 0.05).any()) for table in tables)
            low, high = wilson(called, n_tables, 0.95)
            size = {"n_tasks": n_tasks, "n_trainings": n_trainings, "over": over}
            parts.append({**size, "value": called / n_tables, "low": low, "high": high, "n": n_tables})
    return pd.DataFrame(parts)


if __name__ == "__main__":
    measure().to_parquet(sys.argv[1], index=False)
