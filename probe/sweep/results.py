"""The results of a sweep: one parquet data set, a file a run, readable while the sweep goes on."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow

from probe.digests import check_digests, write_finished_rows
from probe.errors import ProbeError
from probe.files import read_rows
from probe.provenance import environment
from probe.sweep.config import Run

# Types are fixed, so that the files of a data set agree though one has no intervals and another no lengths.
COLUMNS = {
    **dict.fromkeys(("run", "task", "encoding", "scratchpad"), "string"),
    **dict.fromkeys(("seed", "train_length"), "int64"),
    "split": "string",
    "length": "Int64",
    "metric": "string",
    **dict.fromkeys(("value", "low", "high"), "float64"),
    "n": "Int64",
    **dict.fromkeys(("status", "reason", "settings"), "string"),
}


def results_file(folder: Path, run: Run) -> Path:
    return folder / "results" / f"{run.name}.parquet"


def write_results(folder: Path, run: Run, rows: pd.DataFrame, settings: str, train_length: int) -> None:
    """Put the rows of a finished run (split, length, metric, value, low, high, n) among the results."""
    _write(folder, run, rows.assign(status="done", reason=pd.NA), settings, train_length)


def write_failure(folder: Path, run: Run, reason: str, settings: str, train_length: int) -> None:
    """A run that failed is a row that says why."""
    row = {"metric": "failed", "status": "failed", "reason": " ".join(reason.split())}
    _write(folder, run, pd.DataFrame([row]), settings, train_length)


def _write(folder: Path, run: Run, rows: pd.DataFrame, settings: str, train_length: int) -> None:
    keys = {"run": run.name, "task": run.task, "encoding": run.encoding, "scratchpad": run.scratchpad, "seed": run.seed}
    whole = rows.assign(**keys, train_length=train_length, settings=settings)
    whole = whole.reindex(columns=list(COLUMNS)).astype(COLUMNS)
    write_finished_rows(results_file(folder, run), whole, environment())


def read_results(folder: str | Path) -> pd.DataFrame:
    """All that is finished of a sweep, one row a number: run, task, encoding, scratchpad, seed, train_length, split
    ("validation": trained lengths, "test"), length (missing for the whole split), metric, value, low, high, n, status
    ("done", "failed"), reason, settings. A failed run is one row, metric "failed".

    Raises:
        ProbeError: where nothing is finished.
    """
    files = sorted((Path(folder) / "results").glob("*.parquet"))
    if not files:
        raise ProbeError(f"{folder}: a sweep with at least one finished run was wanted, got none")
    return pd.concat([read_run(file) for file in files], ignore_index=True)


def read_run(file: Path) -> pd.DataFrame:
    """The rows of one run's file. It may have no digest: results are copied from one place to another.

    Raises:
        ProbeError: where the file holds no results of a run, or others than were written.
    """
    check_digests(file)
    try:
        rows = read_rows(file, list(COLUMNS)).astype(COLUMNS)
    except (ValueError, TypeError, KeyError, OverflowError, pyarrow.ArrowException) as error:
        if isinstance(error, ProbeError):
            raise
        raise ProbeError(f"{file}: the results of a run were wanted: {error}") from None
    if rows.empty:
        raise ProbeError(f"{file}: must hold the results of a run, got no row")
    return rows


def results_of(rows: pd.DataFrame, metric: str = "exact_match") -> pd.DataFrame:
    """The test accuracies of a sweep as the league wants them (task, encoding, seed, length, accuracy): those of
    lengths beyond the trained ones, and of the whole test set, length missing. Tasks with a scratchpad are tasks of
    their own, "task+scratchpad".

    Raises:
        ProbeError: where there is none.
    """
    test = rows[(rows["status"] == "done") & (rows["split"] == "test") & (rows["metric"] == metric)]
    test = test[test["length"].isna() | (test["length"] > test["train_length"])]
    if test.empty:
        raise ProbeError(f"results with {metric!r} of a test set were wanted, got none")
    task = test["task"].where(test["scratchpad"] == "none", test["task"] + "+" + test["scratchpad"])
    found = pd.DataFrame({"task": task.astype(str), "encoding": test["encoding"].astype(str)})
    columns = {"seed": test["seed"], "length": test["length"], "accuracy": test["value"]}
    return found.assign(**columns).reset_index(drop=True)


def failures(rows: pd.DataFrame) -> Sequence[str]:
    """A line for every run that failed."""
    failed = rows[rows["status"] == "failed"]
    return [f"{row.run} failed: {row.reason}" for row in failed.itertuples()]
