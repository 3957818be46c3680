"""Runs on a Ray cluster: the same work, placed by the cluster, with a share of a GPU each."""

import logging
import socket
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from probe.device import use_threads
from probe.errors import ProbeError
from probe.sweep.config import Run, SweepConfig
from probe.sweep.local import Outcome, attempt

if TYPE_CHECKING:
    import pandas as pd


def run_on_ray(
    sweep: SweepConfig,
    runs: Sequence[Run],
    folder: Path,
    *,
    address: str,
    device: str | None,
    cpus: float,
    gpus: float,
    retries: int,
) -> Generator[Outcome, None, None]:
    """Every run's outcome as it comes. A run whose worker or node dies is placed again, ``retries`` times.

    This package must be installed on every node. Where all nodes see ``folder`` under the same path, such a run goes on
    from its newest checkpoint; where not, it starts anew. Results are written here, by the one who asks, once a run.

    Raises:
        ProbeError: where Ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise ProbeError("sweeps on Ray want the extra: pip install 'position-probe[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        try:
            _reach(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise ProbeError(f"no Ray cluster answers at {address!r}: {error}") from None
    try:
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)(_on_worker)
        waiting = {remote.remote(sweep, run, str(folder), device, max(1, int(cpus))): run for run in runs}
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            for reference in done:
                run = waiting.pop(reference)
                try:
                    yield run, ray.get(reference)
                except ray.exceptions.RayError as error:  # the worker died once too often
                    first = str(error).strip().splitlines()
                    yield run, f"{type(error).__name__}: {first[0] if first else ''}"
    finally:
        if ours:
            ray.shutdown()


def _reach(address: str, seconds: float = 10.0) -> None:
    """Knock at "host:port"; Ray itself would wait for minutes at a door that is not there."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=seconds).close()


def _on_worker(sweep: SweepConfig, run: Run, folder: str, device: str | None, threads: int) -> "pd.DataFrame | str":
    use_threads(threads)
    return attempt(sweep, run, folder, device)
