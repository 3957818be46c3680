"""Independent pieces of work, one after the other or side by side."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

from probe.limits import adopt, current

Work = TypeVar("Work")
Result = TypeVar("Result")


def in_processes(fn: Callable[[Work], Result], work: Sequence[Work], jobs: int) -> Iterator[Result]:
    """``fn`` of each piece of work, in their order, in so many processes of one thread each; in this process if jobs
    is 1."""
    if jobs == 1:
        yield from map(fn, work)
        return
    with ProcessPoolExecutor(jobs, initializer=_begin, initargs=(current().changed(),)) as pool:
        yield from pool.map(fn, work)


def _begin(given: Mapping[str, Any]) -> None:
    adopt(given)
    torch.set_num_threads(1)
