"""Scores of predictions from sums over the tokens of each sequence, and their intervals by drawing sequences anew."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from probe.config import check_number, check_size
from probe.statistics import SEQUENCES, Interval, drawn_shares, expanded_tail, over_trainings

# What is summed over the tokens of a sequence: e is the error of the prediction, y the target about any origin.
SUMS = ("1", "y", "y²", "e²", "|e|", "|e| < ½")
Sums = Float64[Tensor, "*lead sum"]


def token_sums(
    y: Float64[Tensor, "row target"], error: Float64[Tensor, "row target"], group: Int[Tensor, "row"], n_groups: int
) -> Float64[Tensor, "{n_groups} target sum"]:
    """``SUMS`` over the rows of each group; a row counts only for the targets that are defined there."""
    defined = ~y.isnan()
    y, error = torch.where(defined, y, 0.0), torch.where(defined, error, 0.0)
    exact = (defined & (error.abs() < 0.5)).double()
    each = torch.stack((defined.double(), y, y.square(), error.square(), error.abs(), exact), dim=-1)
    return each.new_zeros(n_groups, *each.shape[1:]).index_add_(0, group.to(each.device), each)


def r2(sums: Sums) -> Float64[Tensor, "*lead"]:
    """1 - Σ e² / Σ (y - ȳ)², at most 1; 0 is what the mean target reaches, below 0 is worse. NaN for a constant y."""
    n, y, y2, e2 = sums[..., :4].unbind(-1)
    spread = y2 - y.square() / n
    return torch.where(spread > 1e-12 * y2, 1 - e2 / spread, torch.nan)


def mean_squared_error(sums: Sums) -> Float64[Tensor, "*lead"]:
    """Mean e², in the target's unit squared."""
    return sums[..., 3] / sums[..., 0]


def mean_absolute_error(sums: Sums) -> Float64[Tensor, "*lead"]:
    """Mean |e|, in the target's unit."""
    return sums[..., 4] / sums[..., 0]


def accuracy(sums: Sums) -> Float64[Tensor, "*lead"]:
    """The share of predictions that are right when rounded to an integer, in [0, 1]."""
    return sums[..., 5] / sums[..., 0]


Metric = Callable[[Sums], Float64[Tensor, "*lead"]]


@dataclass(frozen=True)
class Draws:
    """How often each sequence is in each draw with replacement: the same draws for all scores, so that differences are
    paired. Row 0 counts every sequence once, so that it gives the point estimate."""

    sequences: Float64[Tensor, "draw sequence"]
    confidence: float

    @classmethod
    def of(cls, n_sequences: int, n_draws: int, confidence: float, seed: int) -> "Draws":
        """Row 0, and n_draws draws of n_sequences."""
        check_size("n_bootstrap", n_draws)
        check_number("confidence", confidence, 0, 1)
        drawn = drawn_shares(n_sequences, n_draws, torch.Generator().manual_seed(seed)) * n_sequences
        return cls(torch.cat((drawn.new_ones(1, n_sequences), drawn)), confidence)

    def score(
        self, sums: Float64[Tensor, "model sequence *rest sum"], metric: Metric
    ) -> Float64[Tensor, "draw model *rest"]:
        """A score of each model on every draw."""
        return metric(torch.tensordot(self.sequences, sums, dims=([1], [1])))

    def interval(self, scores: Float64[Tensor, "draw *rest"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values and their expanded percentile intervals (``probe.statistics.expanded_tail``). Draws in which a score
        is not defined, such as those of one position only, are left out."""
        drawn = scores[1:].numpy()
        drawn = np.where(np.isnan(drawn).all(0), 0, drawn)  # those have no value either
        tail = expanded_tail(self.confidence, self.sequences.shape[1])
        low, high = np.nanquantile(drawn, [tail, 1 - tail], axis=0)
        return scores[0].numpy(), low, high

    def of_models(self, scores: Float64[Tensor, "draw model target"]) -> list[Interval]:
        """The mean over models of each target's score: an interval over sequences for a single model; over both,
        sequences and trainings, for several (``probe.statistics.over_trainings``)."""
        if scores.shape[1] == 1:
            by_target = zip(*self.interval(scores[:, 0]), strict=True)
            return [Interval(float(value), float(low), float(high), SEQUENCES) for value, low, high in by_target]
        n, found = scores.shape[1], []
        for each in scores.unbind(-1):
            value, draws = float(each[0].mean()), each[1:].mean(1)
            left_out = [float(each[0, torch.arange(n) != m].mean()) for m in range(n)]
            of_draws = draws[~draws.isnan()]
            found.append(over_trainings(value, [left_out], of_draws, self.sequences.shape[1], self.confidence))
        return found


METRICS: dict[str, Metric] = {
    "r2": r2,
    "mean_absolute_error": mean_absolute_error,
    "mean_squared_error": mean_squared_error,
}

#: The least and greatest value of a score, where there is one: no interval goes beyond.
BOUNDS: dict[str, tuple[float, float]] = {
    "r2": (-math.inf, 1.0),
    "accuracy": (0.0, 1.0),
    "mean_absolute_error": (0.0, math.inf),
    "mean_squared_error": (0.0, math.inf),
}
