"""Confidence intervals by drawing sequences with replacement. Efron & Tibshirani 1993, chapter 13 (percentiles)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from probe.errors import ProbeError


@dataclass(frozen=True)
class Bootstrap:
    """The same draws of n sequences for all that is measured on them, so that differences are paired."""

    weights: Float64[Tensor, "draw sequence"]
    confidence: float

    @classmethod
    def draw(cls, n_sequences: int, n_draws: int, confidence: float, seed: int) -> "Bootstrap":
        """Draw n_draws times n of n sequences; ``weights`` says what share of a draw each sequence is.

        Raises:
            ProbeError: for no draw at all, or a confidence outside (0, 1).
        """
        if n_draws < 1:
            raise ProbeError(f"n_bootstrap must be at least 1, got {n_draws}")
        if not 0 < confidence < 1:
            raise ProbeError(f"confidence must be in (0, 1), got {confidence}")
        drawn = torch.randint(n_sequences, (n_draws, n_sequences), generator=torch.Generator().manual_seed(seed))
        count = torch.zeros(n_draws, n_sequences, dtype=torch.float64)
        count.scatter_add_(1, drawn, torch.ones_like(count))
        return cls(count / n_sequences, confidence)

    def means(self, values: Float64[Tensor, "sequence *rest"]) -> Float64[Tensor, "draw *rest"]:
        """The mean of each draw; infinite where an infinite value was drawn."""
        infinite = values.isinf()
        means = torch.tensordot(self.weights, values.masked_fill(infinite, 0.0), dims=1)
        # 0 · inf would be NaN, so infinite values are counted instead of weighted; distances have no -inf.
        return means.masked_fill(torch.tensordot(self.weights, infinite.double(), dims=1) > 0, math.inf)

    def interval(
        self, means: Float64[Tensor, "draw *rest"]
    ) -> tuple[Float64[Tensor, "*rest"], Float64[Tensor, "*rest"]]:
        """The percentiles (1 ∓ confidence)/2 of the draws: order statistics, rounded outward and not interpolated, so
        that infinite ones stay infinite."""
        ordered, last = means.sort(dim=0).values, len(means) - 1
        tail = (1 - self.confidence) / 2
        return ordered[math.floor(tail * last)], ordered[math.ceil((1 - tail) * last)]
