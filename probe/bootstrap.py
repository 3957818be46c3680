"""Confidence intervals by drawing with replacement. Efron & Tibshirani 1993, chapter 13 (percentiles)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from probe.errors import ProbeError


def drawn_shares(
    n: int, n_draws: int, generator: torch.Generator, at_least: int = 1
) -> Float64[Tensor, "{n_draws} {n}"]:
    """Draw n of n things with replacement, n_draws times: what share of a draw each of them is.

    Draws that hold fewer than ``at_least`` different things are drawn anew.
    """
    shares = torch.zeros(n_draws, n, dtype=torch.float64)
    todo = torch.arange(n_draws)
    while len(todo):
        drawn = torch.randint(n, (len(todo), n), generator=generator)
        count = torch.zeros(len(todo), n, dtype=torch.float64)
        shares[todo] = count.scatter_add_(1, drawn, torch.ones_like(count)) / n
        todo = todo[(shares[todo] > 0).sum(1) < at_least]
    return shares


@dataclass(frozen=True)
class Bootstrap:
    """The same draws of n sequences for all that is measured on them, so that differences are paired."""

    weights: Float64[Tensor, "draw sequence"]
    confidence: float

    @classmethod
    def draw(cls, n_sequences: int, n_draws: int, confidence: float, seed: int | torch.Generator) -> "Bootstrap":
        """Draw n_draws times n of n sequences; ``weights`` says what share of a draw each sequence is.

        Raises:
            ProbeError: for no draw at all, or a confidence outside (0, 1).
        """
        if n_draws < 1:
            raise ProbeError(f"n_bootstrap must be at least 1, got {n_draws}")
        if not 0 < confidence < 1:
            raise ProbeError(f"confidence must be in (0, 1), got {confidence}")
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        return cls(drawn_shares(n_sequences, n_draws, generator), confidence)

    @property
    def value_and_draws(self) -> Float64[Tensor, "one_and_draw sequence"]:
        """``weights`` with the mean over all sequences, which is the value itself, as the first row."""
        n = self.weights.shape[1]
        return torch.cat((torch.full((1, n), 1 / n, dtype=torch.float64), self.weights))

    def means(self, values: Float64[Tensor, "sequence *rest"]) -> Float64[Tensor, "draw *rest"]:
        """The mean of each draw; infinite where an infinite value was drawn."""
        infinite = values.isinf()
        means = torch.tensordot(self.weights, values.masked_fill(infinite, 0.0), dims=1)
        if not infinite.any():
            return means
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
