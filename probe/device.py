"""The device that is used where nobody says which, how processes share the cores, and which float32 products train."""

import contextlib
import functools
import os
from collections.abc import Iterator

import torch

from probe.config import check_size
from probe.errors import ProbeError

DEVICES = ("cuda", "mps", "cpu")
EXACT = 1e-6  # relative error of a product in float32, rounding included; bfloat16's is 3e-3


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


@contextlib.contextmanager
def gradients() -> Iterator[None]:
    """Gradients are taken inside, also where the caller has switched them off (``torch.set_grad_enabled(False)``,
    ``torch.no_grad``, ``torch.inference_mode``)."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Within this block a CPU computes products of float32 matrices by oneDNN, where these are as exact as float32 is.

    On AMD's processors that is twice as fast as torch's default, MKL. Torch takes oneDNN when it may use bfloat16
    inside (precision "medium"). Some processors then really do, with an error a thousand times float32's: there, and
    where the precision has been set by somebody, the block changes nothing. ``product_kernels`` tells which it is.
    One product of tiny matrices takes 10 µs longer, so what works token by token is better left outside.
    """
    with _medium_precision() if product_kernels(device) == "oneDNN" else contextlib.nullcontext():
        yield


def product_kernels(device: torch.device) -> str:
    """Whose products ``fast_products`` takes: "oneDNN", or "torch's default"."""
    usable = device.type == "cpu" and torch.backends.mkldnn.is_available() and _untouched()
    return "oneDNN" if usable and _medium_error() < EXACT else "torch's default"


def _untouched() -> bool:
    """Whether the precision of products is what torch begins with: else it is somebody's will, or "medium" already."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set by torch.backends, of which this function knows nothing
        return False


@contextlib.contextmanager
def _medium_precision() -> Iterator[None]:
    """Only where the precision is what torch begins with, which is what it is again afterwards."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@functools.cache
def _medium_error() -> float:
    """The largest relative error of products at precision "medium", forward and backward, plain and in batches."""
    drawn = torch.Generator().manual_seed(0)
    with _medium_precision():
        return max(
            product_error(torch.randn(*shape, generator=drawn), torch.randn(*shape, generator=drawn), transposed)
            for shape in ((256, 256), (512, 512), (8, 64, 64))
            for transposed in (False, True)
        )


def product_error(a: torch.Tensor, b: torch.Tensor, transposed: bool = False) -> float:
    """‖ab − (ab)₆₄‖ / ‖(ab)₆₄‖, or of aᵀb: how far a product of float32 matrices is from that in float64."""
    left = a.mT if transposed else a
    exact = left.cpu().double() @ b.cpu().double()
    return float(((left @ b).cpu().double() - exact).norm() / exact.norm())
