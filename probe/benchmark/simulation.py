"""What every simulation is, and what several of them draw."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probe.tracing import PATTERN, Trace, block_site

CONFIDENCE = 0.95
LENGTH = 8  # tokens of a simulated sequence
LARGE = 20_000  # sequences in the sample that stands for the distribution
VARIANCE = (LENGTH**2 - 1) / 12  # of the positions 0…LENGTH - 1
ERROR = 1.0  # the mean squared error of a probe

# By the name of a number: its interval and the truth.
Found = Mapping[str, tuple[float, float, float]]
Size = Mapping[str, int]


@dataclass(frozen=True)
class Simulation:
    """One interval of the toolkit on data whose truth is known."""

    about: str  #: what the interval is of, in one sentence
    over: str  #: "sequences", "trainings", "both", "tasks", "heads" or "points"
    sizes: Sequence[Size]  #: how many of each there are
    draw: Callable[[np.random.Generator, Size], Found]  #: one data set's intervals, and the truth
    cost: int = 1  #: how many data sets of the cheapest simulation take as long as one of this


def drawn_seed(rng: np.random.Generator) -> int:
    """A seed for the draws of a measurement."""
    return int(rng.integers(2**31))


def trace_of(pattern: Tensor) -> Trace:
    """The trace of one layer of this pattern, in which no two sequences are the same."""
    n = len(pattern)
    tokens = torch.arange(n * LENGTH).view(n, LENGTH)
    return Trace(tokens, torch.full((n,), LENGTH), {block_site(0, PATTERN): pattern}, 1)


def sums_of_probes(rng: np.random.Generator, of_model: np.ndarray, sequences: int) -> Tensor:
    """What ``probe.position.probes.scores.token_sums`` makes of probes whose errors are so many times ``ERROR``, and
    differ from sequence to sequence."""
    y, models = np.arange(LENGTH) - (LENGTH - 1) / 2, len(of_model)
    squares = ERROR * of_model * rng.gamma(8, 1 / 8, (1, sequences)) * rng.chisquare(LENGTH, (models, sequences))
    sums = np.zeros((models, sequences, 1, 6))
    sums[..., 0, 0], sums[..., 0, 2], sums[..., 0, 3] = LENGTH, (y**2).sum(), squares
    return torch.from_numpy(sums)


def sizes_of(**each: Sequence[int]) -> list[Size]:
    """The first of each, the second of each, …"""
    return [dict(zip(each, values, strict=True)) for values in zip(*each.values(), strict=True)]
