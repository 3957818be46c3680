"""A sweep: what is left of a grid is run, and every run's result is written once."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from probe.config import check_number, check_size
from probe.deprecation import old_arguments
from probe.device import find_device, share_cores
from probe.errors import ProbeError
from probe.files import write_text
from probe.progress import OnProgress, untold
from probe.runs import at_work
from probe.sweep.config import Run, SweepConfig
from probe.sweep.local import run_locally
from probe.sweep.results import read_results, read_run, results_file, write_failure, write_results
from probe.sweep.work import clear

FORMAT = 1  # of sweep.json


@old_arguments(sweep="config")
def run_sweep(
    config: SweepConfig,
    folder: str | Path,
    *,
    device: str | None = None,
    jobs: int | None = None,
    ray: str | None = None,
    gpus_per_run: float | None = None,
    cpus_per_run: float = 1,
    retries: int = 2,
    retry_failed: bool = False,
    say: Callable[[str], None] = lambda line: None,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Run a grid in a folder, or what is left of it, and return all its results (see ``read_results``).

    A run that is finished, well or with an error, is not run again; one that was broken off goes on from its newest
    checkpoint. The grid may grow: a folder takes further tasks, encodings and seeds, and what it has stays.

    Args:
        config: the grid, and how each of its models is made, trained and evaluated.
        folder: made where it does not exist.
        device: "cuda", "mps" or "cpu"; found by itself where None (on a cluster, by each run).
        jobs: runs at a time on this machine; by default one a core on a CPU, one on an accelerator.
        ray: the address of a Ray cluster to run on ("auto": the one of this machine), in place of this process's own.
        gpus_per_run: the share of a GPU that a run asks the cluster for; by default 1 for "cuda", else none.
        cpus_per_run: cores that it asks for.
        retries: how often a run whose process died is tried again.
        retry_failed: run those again that failed.
        say: called with a line for every run that is finished.
        on_progress: called with how many runs are finished, those of an earlier sweep included, and how many there are.

    Raises:
        ProbeError: where the folder is another command's or holds a result of the same name but other settings, or
            another process is at work there.
        KeyboardInterrupt: on Ctrl-C. Processes have ended by then, and whatever was finished is in the folder, whole.
    """
    folder = Path(folder)
    check_size("retries", retries, least=0)
    check_number("cpus_per_run", cpus_per_run)
    runs = config.runs()
    with at_work(folder, "sweep"):
        todo = _left(config, runs, folder, retry_failed)
        write_text(folder / "sweep.json", json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, indent=2) + "\n")
        if ray is None:
            torch_device = find_device(device)
            jobs, threads = share_cores(torch_device, jobs, len(todo))
            outcomes = run_locally(
                config, todo, folder, device=str(torch_device), jobs=jobs, threads=threads, retries=retries
            )
        else:
            from probe.sweep.cluster import run_on_ray

            gpus = float(device == "cuda") if gpus_per_run is None else gpus_per_run
            check_number("gpus_per_run", gpus, closed=True)
            outcomes = run_on_ray(
                config, todo, folder, address=ray, device=device, cpus=cpus_per_run, gpus=gpus, retries=retries
            )
        done = len(runs) - len(todo)
        on_progress(done, len(runs))
        with contextlib.closing(outcomes):  # ends what is at work, whatever happens here
            for run, outcome in outcomes:
                done += 1
                said = _keep(config, run, outcome, folder)
                say(f"[{done}/{len(runs)}] {run.name}: {said}")
                on_progress(done, len(runs))
    return read_results(folder)


def _left(sweep: SweepConfig, runs: list[Run], folder: Path, retry_failed: bool) -> list[Run]:
    """The runs of the grid that have no result yet."""
    left = []
    for run in runs:
        path = results_file(folder, run)
        if path.exists():
            found = read_run(path).iloc[0]
            if found["settings"] != run.settings(sweep):
                raise ProbeError(
                    f"{path} was made with other settings of its task, model or training: take another folder, or "
                    "remove it"
                )
            if not (retry_failed and found["status"] == "failed"):
                continue
        left.append(run)
    return left


def _keep(sweep: SweepConfig, run: Run, outcome: pd.DataFrame | str, folder: Path) -> str:
    """Write what became of a run, and say it."""
    length, settings = run.make_task(sweep).train_length, run.settings(sweep)
    if isinstance(outcome, str):
        write_failure(folder, run, outcome, settings, length)
        return f"failed: {outcome}"
    write_results(folder, run, outcome, settings, length)
    clear(sweep, run, folder)
    return _in_words(outcome)


def _in_words(rows: pd.DataFrame) -> str:
    overall = rows[rows["length"].isna() & (rows["metric"] == "exact_match")]
    return ", ".join(f"{row.split} {row.value:.3f}" for row in overall.itertuples())
