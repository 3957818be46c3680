"""Times of several functions in one run, so that their ratios hold on a noisy machine."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping


def seconds(functions: Mapping[str, Callable[[], object]], repeats: int = 7, warm_up: int = 1) -> dict[str, float]:
    """The median time of each function in seconds. They take turns, so that what slows the machine slows them all."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(warm_up + repeats):
        for name, function in functions.items():
            gc.collect()
            started = time.perf_counter()
            function()
            if round_ >= warm_up:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}
