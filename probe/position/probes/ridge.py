"""Ridge regression from moments: many strengths from one eigendecomposition, the best by folds that are subtracted."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from probe.config import check_size
from probe.errors import ProbeError
from probe.position.probes.moments import Moments, as_columns, eigen

#: Strengths that are tried where none is given, for features of unit variance and the sum of squared errors. They go
#: far up, for a site that tells nothing, and far down, for one that holds position exactly.
ALPHAS = tuple(10.0**k for k in range(-4, 5))

Solution = tuple[Float64[Tensor, "strength feature target"], Float64[Tensor, "strength target"]]


def check_alphas(alphas: Sequence[float], *, zero: bool = False) -> None:
    """Refuse anything but some finite numbers above 0, or of at least 0 where ``zero``."""
    if not alphas or not all(np.isfinite(a) and (a > 0 or (zero and a == 0)) for a in alphas):
        raise ProbeError(f"alphas must be numbers {'of at least' if zero else 'above'} 0, got {list(alphas)}")


def ridge_path(moments: Moments, alphas: Sequence[float], standardize: bool = False) -> Solution:
    """Coefficients and intercepts that minimise Σ (y - x·w - b)² + alpha ‖w‖², for every strength and target.

    With V Λ Vᵀ the scatter matrix of the features, w = V (Λ + alpha)⁻¹ Vᵀ Σ (x - x̄)(y - ȳ): one decomposition for all
    strengths. With ``standardize`` the penalty is on the coefficients of features of unit variance; those returned are
    for the features as they are. A feature that is constant to the precision of the rows gets the coefficient 0 there,
    and alpha = 0 gives the shortest of the least-squares solutions.
    """
    d = moments.n_features
    mean_x, mean_y = moments.means
    scatter = moments.scatter
    xx, xy = scatter[:d, :d], scatter[:d, d:]
    unscale = torch.ones_like(mean_x)
    if standardize:
        std = (xx.diagonal() / moments.n).clamp(min=0).sqrt()
        unscale = torch.where(std > moments.eps * mean_x.abs(), 1 / std, 0.0)
    values, vectors = eigen(unscale[:, None] * xx * unscale)
    values = values.clamp(min=0)
    rotated = vectors.T @ (unscale[:, None] * xy)
    penalised = values + torch.tensor(alphas, dtype=torch.float64, device=values.device)[:, None]
    lost = penalised <= d * torch.finfo(torch.float64).eps * values[-1]
    inverse = torch.where(lost, 0.0, 1 / penalised)
    coef = unscale[:, None] * (vectors @ (inverse[..., None] * rotated))
    return coef, mean_y - mean_x @ coef


def best_strengths(
    folds: Sequence[Moments], alphas: Sequence[float], standardize: bool = False
) -> Int[Tensor, "target"]:
    """Which of the strengths has the least mean squared error on the fold that it was not fitted to, for each target;
    the mean is over folds. A fit leaves a fold out by subtracting its moments."""
    total = sum(folds[1:], start=folds[0])
    errors = sum(
        (fold.squared_errors(*ridge_path(total - fold, alphas, standardize)) / fold.n for fold in folds),
        start=torch.zeros(()),
    )
    return errors.argmin(0)


def fit_folds(
    folds: Sequence[Moments], alphas: Sequence[float], standardize: bool = False
) -> tuple[Float64[Tensor, "feature target"], Float64[Tensor, "target"], Float64[Tensor, "target"]]:
    """The ridge regression on all folds, the strength of each target chosen between them: coefficients, intercepts and
    strengths.

    Raises:
        ProbeError: where there is a choice of strengths and only one fold.
    """
    alphas = sorted(alphas)
    total = sum(folds[1:], start=folds[0])
    coef, intercept = ridge_path(total, alphas, standardize)
    if len(alphas) == 1:
        best = torch.zeros(coef.shape[-1], dtype=torch.long, device=coef.device)
    elif len(folds) < 2:
        raise ProbeError(f"a choice between {len(alphas)} strengths wants at least 2 folds, got {len(folds)}")
    else:
        best = best_strengths(folds, alphas, standardize)
    each = torch.arange(coef.shape[-1], device=coef.device)
    return coef[best, :, each].T, intercept[best, each], torch.tensor(alphas, dtype=torch.float64)[best.cpu()]


class RidgeProbe(MultiOutputMixin, RegressorMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Linear regression with the penalty alpha ‖w‖², a scikit-learn estimator: its coefficients are ``Ridge``'s.

    Args:
        alphas: strengths; where there are several, each target's is chosen by cross-validation.
        standardize: penalise the coefficients of features of unit variance (``coef_`` is for those given).
        folds: into how many parts the rows, or the groups of rows, are dealt for that.

    Attributes:
        coef_, intercept_: as scikit-learn's.
        alpha_: the strength of each target; a number where ``y`` was a vector.
    """

    # What it is made with is unchecked until the fit, as scikit-learn has it.
    def __init__(self, alphas: Any = (1.0,), standardize: Any = False, folds: Any = 5) -> None:
        self.alphas = alphas
        self.standardize = standardize
        self.folds = folds

    def fit(self, X: Any, y: Any, groups: Any = None) -> "RidgeProbe":
        """Fit to rows. Rows of one of the ``groups`` (sequences, say) are never on both sides of a fold; groups are
        dealt to folds in turn, in sorted order; without groups every row is one of its own."""
        check_alphas([*self.alphas], zero=True)
        check_size("folds", self.folds, least=2)
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=[np.float64, np.float32])
        x, targets = torch.as_tensor(np.require(X, requirements=["C", "W"])), as_columns(y)  # torch wants to write
        if len(self.alphas) == 1:
            return self._fit_folds([Moments.of(x, targets, torch.float64)], y.ndim)
        _, group = np.unique(np.arange(len(y)) if groups is None else np.asarray(groups), return_inverse=True)
        n_folds = min(self.folds, int(group.max()) + 1)
        if n_folds < 2:
            raise ProbeError(f"a choice between strengths wants at least 2 groups of samples, got n_samples={len(y)}")
        empty = Moments.about(x, targets, torch.float64)
        parts = [torch.as_tensor(np.flatnonzero(group % n_folds == f)) for f in range(n_folds)]
        return self._fit_folds([empty.and_rows(x[part], targets[part]) for part in parts], y.ndim)

    @classmethod
    def from_moments(cls, *folds: Moments, **params: Any) -> "RidgeProbe":
        """The probe of rows that are gone, from the moments of each fold of them; one fold where there is one
        strength. Targets are always a matrix: ``predict`` gives a column for each."""
        probe = cls(**params)
        check_alphas([*probe.alphas], zero=True)
        return probe._fit_folds(folds, n_dims=2)

    def _fit_folds(self, folds: Sequence[Moments], n_dims: int) -> "RidgeProbe":
        weights, offset, chosen = fit_folds(folds, [float(alpha) for alpha in self.alphas], self.standardize)
        coef, intercept, alpha = weights.T.cpu().numpy(), offset.cpu().numpy(), chosen.numpy()
        self.n_features_in_ = coef.shape[1]
        vector = n_dims == 1
        self.coef_: np.ndarray = coef[0] if vector else coef
        self.intercept_: float | np.ndarray = float(intercept[0]) if vector else intercept
        self.alpha_ = float(alpha[0]) if vector else alpha
        return self

    def predict(self, X: Any) -> np.ndarray:
        """x·w + b."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        return X @ self.coef_.T + self.intercept_
