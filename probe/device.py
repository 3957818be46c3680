"""The device that is used where nobody says which, and how processes share the cores."""

import os

import torch

from probe.config import check_size
from probe.errors import ProbeError

DEVICES = ("cuda", "mps", "cpu")


def find_device(name: str | None = None) -> torch.device:
    """The named device, or the first of CUDA, MPS and CPU that is there.

    Raises:
        ProbeError: where the named one is unknown or not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind in DEVICES if there[kind]))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ProbeError(f"device must be one of {', '.join(DEVICES)}, got {name!r}") from None
    if not there.get(device.type, False):
        raise ProbeError(
            f"device {name!r} was wanted, but this machine has {', '.join(k for k in DEVICES if there[k])}"
        )
    return device


def share_cores(device: torch.device, jobs: int | None, n_tasks: int) -> tuple[int, int]:
    """How many tasks to work on at once, and the threads of each.

    By default one task a core on a CPU, and one on an accelerator.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs is None:
        jobs = min(cores, max(1, n_tasks)) if device.type == "cpu" else 1
    check_size("jobs", jobs)
    return jobs, max(1, cores // jobs)


def use_threads(n: int) -> None:
    """Torch, and the BLAS of numpy, scipy and scikit-learn, each at most n: processes that share cores else wait for
    one another's threads."""
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(n)
    threadpool_limits(n)
