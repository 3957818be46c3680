"""Runs in processes of this machine, one process a run: what kills one kills no other."""

import multiprocessing
from collections.abc import Generator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pandas as pd

from probe.device import use_threads
from probe.errors import ProbeError
from probe.limits import adopt, current
from probe.processes import deaf_to_interrupts, end, end_with_parent
from probe.runs import working_in
from probe.sweep.config import Run, SweepConfig

Outcome = tuple[Run, pd.DataFrame | str]  # rows, or why there are none


def run_locally(
    sweep: SweepConfig,
    runs: Sequence[Run],
    folder: Path,
    *,
    device: str | None,
    jobs: int,
    threads: int,
    retries: int,
) -> Generator[Outcome, None, None]:
    """Every run's outcome as it comes. A process that dies is started again, ``retries`` times, and goes on from the
    run's newest checkpoint; one that raises an error is not, for it would raise it again. Whoever stops asking, or is
    interrupted, ends those at work."""
    context = multiprocessing.get_context("spawn")
    todo = [(run, 0) for run in reversed(runs)]
    working: dict[Connection, tuple[SpawnProcess, Run, int]] = {}
    try:
        while todo or working:
            while todo and len(working) < jobs:
                run, tries = todo.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_child, args=(sweep, run, folder, device, threads, current().changed(), theirs), daemon=True
                )
                with deaf_to_interrupts():
                    process.start()
                theirs.close()  # the child's end: when it dies, ours says so
                working[ours] = process, run, tries
            ready = wait(list(working))
            for connection in [each for each in working if each in ready]:
                process, run, tries = working.pop(connection)
                try:
                    outcome = connection.recv()
                except EOFError:
                    outcome = None
                process.join()
                connection.close()
                if outcome is not None:
                    yield run, outcome
                elif tries < retries:
                    todo.append((run, tries + 1))
                else:
                    yield run, f"its process ended with exit code {process.exitcode}, {tries + 1} times"
    finally:
        end([process for process, _, _ in working.values()])


def _child(
    sweep: SweepConfig,
    run: Run,
    folder: Path,
    device: str | None,
    threads: int,
    given: Mapping[str, Any],
    connection: Connection,
) -> None:
    adopt(given)
    end_with_parent()
    use_threads(threads)
    with working_in(folder):
        connection.send(attempt(sweep, run, folder, device))


def attempt(sweep: SweepConfig, run: Run, folder: str | Path, device: str | None) -> pd.DataFrame | str:
    """The rows of a run, or its error in one line."""
    from probe.sweep.work import work

    try:
        return work(sweep, run, folder, device)
    except Exception as error:  # a sweep outlives whatever one of its runs does
        name = "" if isinstance(error, ProbeError) else f"{type(error).__name__}: "
        return f"{name}{' '.join(str(error).split())}"
