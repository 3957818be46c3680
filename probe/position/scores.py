"""Scores of predictions from sums over the tokens of each sequence, and their intervals by drawing sequences anew."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from probe.config import check_number, check_size

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
    """How often each sequence is in each draw with replacement, and each model: the same draws for all scores, so that
    differences are paired. The first draw is no draw but every sequence and model once: the value itself."""

    sequences: Float64[Tensor, "draw sequence"]
    models: Float64[Tensor, "draw model"]
    confidence: float

    @classmethod
    def of(cls, n_sequences: int, n_draws: int, confidence: float, seed: int, n_models: int = 1) -> "Draws":
        check_size("n_bootstrap", n_draws)
        check_number("confidence", confidence, 0, 1)
        rng = np.random.default_rng(seed)

        def times(n: int) -> Tensor:
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=n_draws)
            return torch.tensor(np.concatenate((np.ones((1, n)), drawn)), dtype=torch.float64)

        return cls(times(n_sequences), times(n_models), confidence)

    def score(self, sums: Float64[Tensor, "model sequence *rest sum"], metric: Metric) -> Float64[Tensor, "draw *rest"]:
        """A score on every draw: of the sequences drawn, for each model, then the mean over the models drawn."""
        drawn = torch.tensordot(self.sequences, sums, dims=([1], [1]))
        by_model = metric(drawn)
        return torch.einsum("dm,dm...->d...", self.models / self.models.sum(1, keepdim=True), by_model)

    def interval(self, scores: Float64[Tensor, "draw *rest"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values and their percentile intervals (Efron & Tibshirani 1993, chapter 13). Draws in which a score is not
        defined, such as those of one position only, are left out."""
        drawn = scores[1:].numpy()
        drawn = np.where(np.isnan(drawn).all(0), 0, drawn)  # those have no value either
        low, high = np.nanquantile(drawn, [(1 - self.confidence) / 2, (1 + self.confidence) / 2], axis=0)
        return scores[0].numpy(), low, high


METRICS: dict[str, Metric] = {
    "r2": r2,
    "mean_absolute_error": mean_absolute_error,
    "mean_squared_error": mean_squared_error,
}
