"""Independent pieces of work, one after the other or side by side."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

Work = TypeVar("Work")
Result = TypeVar("Result")


def in_processes(fn: Callable[[Work], Result], work: Sequence[Work], jobs: int) -> Iterator[Result]:
    """``fn`` of each piece of work, in their order, in so many processes of one thread each; in this process if jobs
    is 1."""
    if jobs == 1:
        yield from map(fn, work)
        return
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(fn, work)
