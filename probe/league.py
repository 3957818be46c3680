"""Which encoding generalises best: a table of ranks over tasks and seeds, and which differences are real.

Results are rows of exact match, ours (``results_of``) or published ones (``read_published``), in one form: task,
encoding, seed, length (missing for a whole test set), accuracy in [0, 1].
"""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from probe.config import MOST_SEED, MOST_SIZE, check_number
from probe.errors import ProbeError
from probe.files import open_plain
from probe.statistics import TASKS, Interval, holm, sign_flip, student

RESULTS = ["task", "encoding", "seed", "length", "accuracy"]
PUBLISHED = ["dataset", "split", "encoding", "seed", "length", "accuracy"]


def read_published(path: str | Path) -> pd.DataFrame:
    """Published accuracies from a CSV file with the columns dataset, split, encoding, seed, length, accuracy.

    A length is a number, or "overall" for a whole test set. The task is called "dataset/split".

    Raises:
        ProbeError: with file and line, where a column is missing, or a number is none or out of its range.
    """
    file = open_plain(path)  # a path is no address, and no archive is unpacked
    try:
        with io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
            wanted = {"usecols": lambda name: name in PUBLISHED, "index_col": False}
            rows = pd.read_csv(text, dtype=str, keep_default_na=False, **wanted)
    except pd.errors.EmptyDataError:
        raise ProbeError(f"{path}: a table with {', '.join(PUBLISHED)} was wanted, got an empty file") from None
    except ValueError as error:  # pandas' parser errors, and what is no UTF-8
        raise ProbeError(f"{path}: a table with {', '.join(PUBLISHED)} was wanted: {error}") from None
    missing = [column for column in PUBLISHED if column not in rows]
    if missing:
        raise ProbeError(
            f"{path}, line 1: the columns {', '.join(PUBLISHED)} were wanted, without {', '.join(missing)}"
        )
    lengths = rows["length"].where(rows["length"] != "overall", "")
    length, seed, accuracy = (pd.to_numeric(c, errors="coerce") for c in (lengths, rows["seed"], rows["accuracy"]))
    for name, bad in (
        ("length", (lengths != "") & ~(length.between(1, MOST_SIZE) & (length % 1 == 0))),
        ("seed", ~(seed.between(-MOST_SEED, MOST_SEED) & (seed % 1 == 0))),
        ("accuracy", ~accuracy.between(0, 1)),
    ):
        if bad.any():
            line = int(bad.to_numpy().argmax())
            wanted = {"length": 'a positive integer or "overall"', "seed": "an integer", "accuracy": "a number in 0…1"}
            raise ProbeError(f"{path}, line {line + 2}: {name} must be {wanted[name]}, got {rows[name].iloc[line]!r}")
    return _checked(
        pd.DataFrame(
            {
                "task": rows["dataset"] + "/" + rows["split"],
                "encoding": rows["encoding"],
                "seed": seed.astype("int64"),
                "length": length.astype("Int64"),
                "accuracy": accuracy.astype(float),
            }
        ),
        str(path),
    )


def _checked(results: pd.DataFrame, whose: str) -> pd.DataFrame:
    """Results, each number once."""
    twice = results.duplicated(["task", "encoding", "seed", "length"])
    if twice.any():
        row = results[twice].iloc[0]
        what = "overall" if pd.isna(row["length"]) else f"length {row['length']}"
        raise ProbeError(f"{whose}: {row['task']}, {row['encoding']}, seed {row['seed']}, {what} is there twice")
    if results.empty:
        raise ProbeError(f"{whose}: at least one accuracy was wanted, got none")
    return results


def run_scores(results: pd.DataFrame, by: str = "lengths") -> pd.DataFrame:
    """One score a run, "task seed" × encoding: the mean over the lengths in ``results`` (every length counts alike), or
    with ``by="overall"`` the accuracy of the whole test set. NaN where a run is missing."""
    if by not in ("lengths", "overall"):
        raise ProbeError(f"scores are by 'lengths' or by 'overall', got {by!r}")
    _check_accuracies(results)
    rows = results[results["length"].isna() == (by == "overall")]
    if rows.empty:
        raise ProbeError(f"scores by {by!r} want such rows, got none")
    return rows.groupby(["task", "seed", "encoding"])["accuracy"].mean().unstack()


def _check_accuracies(results: pd.DataFrame) -> None:
    """Refuse NaN: a mean over the others would not show it."""
    wrong = ~np.isfinite(results["accuracy"].to_numpy(dtype=float, na_value=np.nan))
    if wrong.any():
        raise ProbeError(f"accuracies must be finite, got {results.loc[wrong, 'accuracy'].iloc[0]}")


def reciprocal_ranks(scores: pd.DataFrame) -> pd.DataFrame:
    """1 / rank of every encoding within each row of ``run_scores``, the best first. Encodings that tie share the mean
    of the reciprocal ranks of their places, so every row has the same sum, Σ 1/k. Rows with a missing run are left out.

    Raises:
        ProbeError: where no (task, seed) has all encodings.
    """
    whole = scores.dropna()
    if whole.empty:
        raise ProbeError(f"ranks want at least one task and seed with all of {', '.join(scores.columns)}, got none")
    values = whole.to_numpy().round(12)  # means of the same accuracies tie, in whatever order they were summed
    order = np.argsort(-values, axis=1, kind="stable")
    ranks = np.empty_like(values)
    np.put_along_axis(ranks, order, 1.0 / np.arange(1, values.shape[1] + 1), axis=1)
    shared = np.stack([
        [place[row == mine].mean() for mine in row] for row, place in zip(values, ranks, strict=True)
    ])  # fmt: skip
    return pd.DataFrame(shared, index=whole.index, columns=whole.columns)


def league(results: pd.DataFrame, *, by: str = "lengths", confidence: float = 0.95) -> pd.DataFrame:
    """The mean reciprocal rank of each encoding over (task, seed), every task counting alike; the best comes first.

    Kazemnejad et al. 2023, figure 2.

    Args:
        results: columns task, encoding, seed, length, accuracy; see ``results_of`` and ``read_published``.
        by: "lengths", a run's score is its mean over lengths, or "overall", its accuracy on the whole test set.
        confidence: coverage of the intervals, in (0, 1).

    Returns:
        Columns encoding, metric ("mean_reciprocal_rank" and "mean_accuracy", the mean of ``run_scores`` over the same
        runs), value, low, high, interval, n_tasks, n (task and seed). ``interval`` says over what the interval is:
        "tasks", Student's t over the means of the tasks, which says what other tasks would give; with a single task
        "trainings", Student's t over its seeds; "none" with a single run.

    Raises:
        ProbeError: where no (task, seed) has all encodings.
    """
    check_number("confidence", confidence, 0, 1)
    scores = run_scores(results, by)
    ranks = reciprocal_ranks(scores)
    tasks = ranks.index.get_level_values("task")
    order = np.argsort(-ranks.groupby("task").mean().to_numpy().mean(0), kind="stable")
    rows = []
    for metric, values in (("mean_reciprocal_rank", ranks), ("mean_accuracy", scores.loc[ranks.index])):
        found = [over_tasks(values[encoding], confidence).within(0.0, 1.0) for encoding in ranks.columns]
        rows.append(pd.DataFrame({"encoding": ranks.columns, "metric": metric} | _columns(found)).iloc[order])
    return pd.concat(rows, ignore_index=True).assign(n_tasks=tasks.nunique(), n=len(ranks))


def over_tasks(scores: "pd.Series[float]", confidence: float) -> Interval:
    """The mean over tasks of a score by (task, seed), every task counting alike, and Student's t over tasks, or over
    the seeds of a single task."""
    of_tasks = scores.groupby("task").mean()
    if len(of_tasks) > 1:
        return student(of_tasks.to_numpy(), confidence, TASKS)
    return student(scores.to_numpy(), confidence)


def _columns(found: Sequence[Interval]) -> dict[str, list[float] | list[str]]:
    return {
        "value": [each.value for each in found],
        "low": [each.low for each in found],
        "high": [each.high for each in found],
        "interval": [each.kind for each in found],
    }


def paired_differences(
    results: pd.DataFrame, *, by: str = "lengths", confidence: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Which encodings differ: accuracy of a less that of b, paired over (task, seed), for every pair.

    What is claimed of encodings is claimed of tasks other than these, too, and is tested over tasks:

    - "p_tasks": two-sided, of flipping the signs of the differences of whole tasks, each averaged over its seeds,
      exactly where there are at most 16 tasks. With n tasks it cannot be below 2^(1 - n);
    - "p_holm": p_tasks, corrected for all pairs (Holm 1979); "real" where it is below 1 - confidence;
    - "p_runs": the same as p_tasks, of flipping signs of whole (task, seed) pairs: would other trainings on these very
      tasks show the difference? Nothing about other tasks follows from it.

    Args: those of ``league``, and
        seed: of the flips that are drawn where there are more than 16.

    Returns:
        Columns a, b, value, low, high, interval (as in ``league``), p_runs, p_tasks, p_holm, real, n_tasks, n.

    Raises:
        ProbeError: for fewer than 2 encodings, or fewer than 2 (task, seed) that have them all.
    """
    check_number("confidence", confidence, 0, 1)
    scores = run_scores(results, by).dropna()
    if len(scores) < 2 or scores.shape[1] < 2:
        raise ProbeError(
            f"differences want at least 2 encodings with 2 (task, seed) in common, got {scores.shape[1]} with "
            f"{len(scores)}"
        )
    rows = []
    for a, b in itertools.combinations(scores.columns, 2):
        difference = scores[a] - scores[b]
        p_tasks = sign_flip(difference.groupby("task").mean().to_numpy(), seed)
        found = over_tasks(difference, confidence).within(-1.0, 1.0)
        row = {"a": a, "b": b, "value": found.value, "low": found.low, "high": found.high, "interval": found.kind}
        rows.append(row | {"p_runs": sign_flip(difference.to_numpy(), seed), "p_tasks": p_tasks})
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p_tasks"].to_numpy())
    n_tasks = scores.index.get_level_values("task").nunique()
    return table.assign(real=table["p_holm"] < 1 - confidence, n_tasks=n_tasks, n=len(scores))


def accuracy_by_length(results: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """The mean accuracy over seeds at each length, Student's t interval over seeds clipped to [0, 1] (missing with one
    seed): task, encoding, length, value, low, high, n (seeds)."""
    check_number("confidence", confidence, 0, 1)
    _check_accuracies(results)
    of = results[results["length"].notna()].groupby(["task", "encoding", "length"])["accuracy"]
    rows = of.agg(value="mean", error="sem", n="count").reset_index()
    half = rows["error"] * stats.t.ppf((1 + confidence) / 2, (rows["n"] - 1).clip(lower=1))
    rows["low"], rows["high"] = (rows["value"] - half).clip(lower=0), (rows["value"] + half).clip(upper=1)
    return rows[["task", "encoding", "length", "value", "low", "high", "n"]]
