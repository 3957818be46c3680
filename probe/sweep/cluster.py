"""Runs on a Ray cluster: the same work, placed by the cluster, with a share of a GPU each."""

import logging
import socket
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.device import use_threads
from probe.errors import ProbeError
from probe.limits import adopt, current
from probe.runs import working_in
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
    """Every run's outcome as it comes. A run whose worker or node dies is placed again, ``retries`` times. A run whose
    worker died oftener has failed; a run whose node died oftener, or that never began, has no outcome.

    This package must be installed on every node. Where all nodes see ``folder`` under the same path, such a run goes on
    from its newest checkpoint; where not, it starts anew. Results are written here, by the one who asks, once a run.

    Raises:
        ProbeError: where Ray is not installed, no cluster answers, the cluster is lost, or runs are left because their
            nodes died.
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
    waiting: dict[Any, tuple[Run, int]] = {}  # by Ray's references; the number is of nodes that died
    try:
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)(_on_worker)

        def place(run: Run) -> Any:
            return remote.remote(sweep, run, str(folder), device, max(1, int(cpus)), current().changed())

        waiting |= {place(run): (run, 0) for run in runs}
        orphaned = 0  # runs whose nodes died too often
        while waiting:
            reference = ray.wait(list(waiting), num_returns=1)[0][0]
            run, deaths = waiting.pop(reference)
            try:
                outcome = ray.get(reference)
            except ray.exceptions.RayError as error:
                said = _in_words(error)
                if not isinstance(error, ray.exceptions.RayTaskError) and not _answers(ray):
                    raise ProbeError(_lost(address, said, 1 + len(waiting) + orphaned)) from None
                if not isinstance(error, _of_the_run(ray)):
                    if deaths < retries:
                        waiting[place(run)] = run, deaths + 1
                    else:
                        orphaned += 1
                    continue
                outcome = said
            yield run, outcome
        if orphaned:
            raise ProbeError(f"the nodes of {orphaned} runs died too often; the same command tries these runs again")
    except ray.exceptions.RayError as error:  # raised while nothing in particular was asked for
        raise ProbeError(_lost(address, _in_words(error), len(waiting))) from None
    finally:
        if ours:
            ray.shutdown()


def _reach(address: str, seconds: float = 10.0) -> None:
    """Knock at "host:port"; Ray itself would wait for minutes at a door that is not there."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=seconds).close()


def _of_the_run(ray: Any) -> tuple[type, ...]:
    """What Ray raises where the run itself is the cause: an error in it, or its process died again and again."""
    return ray.exceptions.RayTaskError, ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError


def _answers(ray: Any) -> bool:
    """Whether the cluster still executes what it is given. A task without a share of a core is executed at once."""
    try:
        return ray.get(ray.remote(num_cpus=0, max_retries=0)(_answer).remote(), timeout=current().cluster_seconds)
    except (ray.exceptions.RayError, OSError, RuntimeError):
        return False


def _answer() -> bool:
    return True


def _in_words(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else ''}"


def _lost(address: str, error: str, left: int) -> str:
    return f"the Ray cluster at {address!r} is lost ({error}); the same command tries the {left} runs that are left"


def _on_worker(
    sweep: SweepConfig, run: Run, folder: str, device: str | None, threads: int, given: Mapping[str, Any]
) -> "pd.DataFrame | str":
    adopt(given)
    use_threads(threads)
    with working_in(folder):
        return attempt(sweep, run, folder, device)
