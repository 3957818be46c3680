"""Which encoding generalises best: a table of ranks over tasks and seeds, and which differences are real.

Results are rows of exact match, ours (``results_of``) or published ones (``read_published``), in one form: task,
encoding, seed, length (missing for a whole test set), accuracy in [0, 1].
"""

import io
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from probe.config import MOST_SEED, MOST_SIZE, check_number, check_size
from probe.errors import ProbeError
from probe.files import open_plain

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


def league(
    results: pd.DataFrame,
    *,
    by: str = "lengths",
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The mean reciprocal rank of each encoding over (task, seed), every task counting alike; the best comes first.

    Kazemnejad et al. 2023, figure 2.

    Returns:
        Columns encoding, metric ("mean_reciprocal_rank" and "mean_accuracy", the mean of ``run_scores`` over the same
        runs), value, low, high, n_tasks, n (task and seed). The percentile intervals are over tasks and, within each,
        over seeds, both drawn with replacement.

    Raises:
        ProbeError: where no (task, seed) has all encodings.
    """
    check_size("n_bootstrap", n_bootstrap)
    check_number("confidence", confidence, 0, 1)
    scores = run_scores(results, by)
    ranks = reciprocal_ranks(scores)
    tasks = ranks.index.get_level_values("task")
    draws = _draws_of(tasks, n_bootstrap, seed)
    order = np.argsort(-ranks.groupby("task").mean().to_numpy().mean(0), kind="stable")
    rows = []
    for metric, values in (("mean_reciprocal_rank", ranks), ("mean_accuracy", scores.loc[ranks.index])):
        value = values.groupby("task").mean().to_numpy().mean(0)
        low, high = _interval(draws @ values.to_numpy(), confidence)
        columns = {"encoding": ranks.columns, "metric": metric, "value": value, "low": low, "high": high}
        rows.append(pd.DataFrame(columns).iloc[order])
    return pd.concat(rows, ignore_index=True).assign(n_tasks=tasks.nunique(), n=len(ranks))


def _draws_of(tasks: pd.Index, n_draws: int, seed: int) -> np.ndarray:
    """How much of each draw each (task, seed) is, "draw run": tasks with replacement, and seeds within each."""
    rng = np.random.default_rng(seed)
    names, which = np.unique(tasks, return_inverse=True)
    share = np.zeros((n_draws, len(which)))
    for draw in share:
        for task, times in enumerate(np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))):
            members = np.flatnonzero(which == task)
            for _ in range(times):
                np.add.at(draw, rng.choice(members, size=len(members)), 1 / len(members))
    return share / len(names)


def _interval(draws: np.ndarray, confidence: float) -> np.ndarray:
    return np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)


def paired_differences(
    results: pd.DataFrame,
    *,
    by: str = "lengths",
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Which encodings differ: accuracy of a less that of b, paired over (task, seed), for every pair.

    - "p": two-sided, of flipping the signs of the differences of whole (task, seed) pairs, exactly where there are at
      most 16 of them: would these tasks show it by chance over seeds?
    - "p_tasks": the same for differences averaged over seeds, task by task: would other tasks show it? With n tasks it
      cannot be below 2^(1 - n).
    - "p_holm": p, corrected for all pairs (Holm 1979); "real" where it is below 1 - confidence.

    Returns:
        Columns a, b, value, low, high (percentiles, as in ``league``), p, p_tasks, p_holm, real, n_tasks, n.
    """
    scores = run_scores(results, by).dropna()
    if len(scores) < 2 or scores.shape[1] < 2:
        raise ProbeError(
            f"differences want at least 2 encodings with 2 (task, seed) in common, got {scores.shape[1]} with "
            f"{len(scores)}"
        )
    tasks = scores.index.get_level_values("task")
    draws = _draws_of(tasks, n_bootstrap, seed)
    rows = []
    for a, b in itertools.combinations(scores.columns, 2):
        difference = scores[a] - scores[b]
        low, high = _interval(draws @ difference.to_numpy(), confidence)
        p = _sign_flip(difference.to_numpy(), seed)
        p_tasks = _sign_flip(difference.groupby("task").mean().to_numpy(), seed)
        rows.append((a, b, difference.groupby("task").mean().mean(), low, high, p, p_tasks))
    found = pd.DataFrame(rows, columns=["a", "b", "value", "low", "high", "p", "p_tasks"])
    found["p_holm"] = holm(found["p"].to_numpy())
    return found.assign(real=found["p_holm"] < 1 - confidence, n_tasks=tasks.nunique(), n=len(scores))


def _sign_flip(differences: np.ndarray, seed: int) -> float:
    """The two-sided p of a mean difference when every sign is a coin's."""
    if len(differences) < 2 or not differences.any():
        return 1.0
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=2**16,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def holm(p: np.ndarray) -> np.ndarray:
    """p values corrected for their number, step by step downward. Holm 1979."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(stepped)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


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
