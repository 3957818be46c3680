"""Linear probes: ridge regression from moments, many strengths from one eigendecomposition, the best by folds that are
subtracted."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from probe.config import check_size
from probe.errors import ProbeError
from probe.position.probes.moments import Moments, as_columns, eigen, least_variance, unit_scale

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
    for the features as they are. A feature that is constant to the precision of the rows gets the coefficient 0 there.
    alpha = 0 gives the shortest of the least-squares solutions over the directions in which the rows vary by more than
    rounding (``least_variance``).
    """
    d = moments.n_features
    mean_x, mean_y = moments.means
    scatter = moments.scatter
    xx, xy = scatter[:d, :d], scatter[:d, d:]
    unscale = torch.ones_like(mean_x)
    if standardize:
        std = (xx.diagonal() / moments.n).clamp(min=0).sqrt()
        unscale = unit_scale(std, mean_x, moments.eps)
    values, vectors = eigen(unscale[:, None] * xx * unscale)
    values = values.clamp(min=0)
    rotated = vectors.T @ (unscale[:, None] * xy)
    strengths = torch.tensor(alphas, dtype=torch.float64, device=values.device)[:, None]
    # A penalty leaves a direction that rounding made next to nothing; without one it is left out.
    least = torch.where(strengths > 0, least_variance(values, 0.0), least_variance(values, moments.eps))
    penalised = values + strengths
    inverse = torch.where(penalised <= least, 0.0, 1 / penalised)
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
    strengths. With one fold there is nothing to choose by, and the strength in the middle is taken.
    """
    alphas = sorted(alphas)
    if len(folds) < 2:
        alphas = [alphas[len(alphas) // 2]]
    total = sum(folds[1:], start=folds[0])
    coef, intercept = ridge_path(total, alphas, standardize)
    best = torch.zeros(coef.shape[-1], dtype=torch.long, device=coef.device)
    if len(alphas) > 1:
        best = best_strengths(folds, alphas, standardize)
    each = torch.arange(coef.shape[-1], device=coef.device)
    return coef[best, :, each].T, intercept[best, each], torch.tensor(alphas, dtype=torch.float64)[best.cpu()]


class LinearMap(NamedTuple):
    """A linear map, x ↦ x·``weights`` + ``offset``, and the ``strengths`` with which it was found, by target."""

    weights: Float64[Tensor, "feature target"]
    offset: Float64[Tensor, "target"]
    strengths: Float64[Tensor, "target"]


class LinearProbe(MultiOutputMixin, RegressorMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A linear map from hidden states to targets, which minimises Σ (y - x·w - b)² + alpha ‖w‖². All linear probes of
    this package are such.

    It is fitted to rows at once (``fit``), or to rows that stream by (``update``): only their moments are kept. Rows
    are tensors, or arrays as scikit-learn's estimators take them; it is one, and its coefficients are ``Ridge``'s.

    Args:
        alphas: strengths; where there are several, each target's is chosen by cross-validation between folds. The
            strength 0 gives the shortest least-squares solution over directions that vary by more than rounding.
        standardize: penalise the coefficients of features of unit variance (``coef_`` is for those given). Features
            that are constant to rounding are not read then.
        folds: into how many parts ``fit`` deals the rows, or the groups of rows.

    Attributes:
        coef_, intercept_: as scikit-learn's.
        alpha_: the strength of each target; a number where ``y`` was a vector.
    """

    moments_: dict[int, Moments]  #: the moments of the rows of each fold
    n_features_in_: int  #: the number of features
    _solution: LinearMap | None
    _vector: bool  # whether there is one target, and it was a vector

    # What it is made with is unchecked until the fit, as scikit-learn has it.
    def __init__(self, alphas: Any = (1.0,), standardize: Any = False, folds: Any = 5) -> None:
        self.alphas = alphas
        self.standardize = standardize
        self.folds = folds

    def fit(self, X: Any, y: Any, groups: Any = None) -> "LinearProbe":
        """Fit to rows, and forget those seen before. Rows of one of the ``groups`` (sequences, say) are never on both
        sides of a fold; groups are dealt to folds in turn, in sorted order; without groups every row is one of its own.

        Args:
            X: rows of features, "row feature".
            y: their targets, "row" or "row target".
            groups: the group of each row.

        Raises:
            ProbeError: for strengths below 0, fewer than 2 folds, tensors that are not finite, or fewer than 2 groups
                where there is a choice of strengths.
        """
        check_size("folds", self.folds, least=2)
        x, targets = self._rows(X, y, new=True)
        if len(self.alphas) == 1:
            fold = np.zeros(len(x), dtype=int)
        else:
            _, group = np.unique(np.arange(len(x)) if groups is None else np.asarray(groups), return_inverse=True)
            n_folds = min(self.folds, int(group.max()) + 1)
            if n_folds < 2:
                raise ProbeError(f"a choice of strengths needs at least 2 groups of samples, got n_samples={len(x)}")
            fold = group % n_folds
        for f in range(int(fold.max()) + 1):
            rows = torch.as_tensor(np.flatnonzero(fold == f), device=x.device)
            self._add(x[rows], targets[rows], f)
        self._solution = self._solve()
        return self

    def update(self, X: Any, y: Any, fold: int = 0) -> "LinearProbe":
        """Add the moments of rows to those that were seen. The map is solved for when it is next asked for.

        Args:
            X: rows of features, "row feature".
            y: their targets, "row" or "row target".
            fold: the fold that these rows belong to. Of one fold alone the strength in the middle is taken.

        Raises:
            ProbeError: for strengths below 0, tensors that are not finite, or rows of other widths than before.
        """
        x, targets = self._rows(X, y, new=not hasattr(self, "moments_"))
        self._add(x, targets, fold)
        self._solution = None
        return self

    @classmethod
    def from_moments(cls, *folds: Moments, **params: Any) -> "LinearProbe":
        """The probe of rows that are gone, from the moments of each fold of them. Targets are always a matrix:
        ``predict`` gives a column for each."""
        probe = cls(**params)
        check_alphas([*probe.alphas], zero=True)
        probe.moments_, probe._vector, probe.n_features_in_ = dict(enumerate(folds)), False, folds[0].n_features
        probe._solution = probe._solve()
        return probe

    def _rows(self, X: Any, y: Any, new: bool) -> tuple[Float[Tensor, "row feature"], Float64[Tensor, "row target"]]:
        check_alphas([*self.alphas], zero=True)
        if isinstance(X, Tensor):
            if not (X.isfinite().all() and y.isfinite().all()):
                raise ProbeError("a linear probe needs finite hidden states and targets, got NaN or infinity")
            x, targets = X.detach(), y.detach().to(X.device).double()
            targets = targets[:, None] if y.ndim == 1 else targets
            n_features, known = x.shape[1], x.shape[1] if new else self.n_features_in_
            if n_features != known:
                raise ProbeError(f"rows must have {known} features, as those before, got {n_features}")
            self.n_features_in_ = n_features
        else:
            kinds = [np.float64, np.float32]
            X, y = validate_data(self, X, y, reset=new, multi_output=True, y_numeric=True, dtype=kinds)
            x, targets = torch.as_tensor(np.require(X, requirements=["C", "W"])), as_columns(y)  # torch wants to write
        if new:
            self.moments_ = {}
            self._vector = y.ndim == 1
        return x, targets

    def _add(self, x: Tensor, targets: Tensor, fold: int) -> None:
        if fold not in self.moments_:
            others = next(iter(self.moments_.values()), None)  # moments of one origin add up best
            self.moments_[fold] = Moments.about(x, targets, torch.float64) if others is None else others.emptied()
        self.moments_[fold] = self.moments_[fold].and_rows(x, targets)

    def _solve(self) -> LinearMap:
        folds = [self.moments_[f] for f in sorted(self.moments_)]
        return LinearMap(*fit_folds(folds, [float(alpha) for alpha in self.alphas], self.standardize))

    @property
    def solution(self) -> LinearMap:
        """The map as tensors, where the hidden states were."""
        check_is_fitted(self)
        if self._solution is None:
            self._solution = self._solve()
        return self._solution

    @property
    def coef_(self) -> np.ndarray:
        """The coefficients: a row per target, or one vector for one target that was a vector."""
        coef: np.ndarray = self.solution.weights.T.cpu().numpy()
        return coef[0] if self._vector else coef

    @property
    def intercept_(self) -> float | np.ndarray:
        """The intercept of each target."""
        intercept: np.ndarray = self.solution.offset.cpu().numpy()
        return float(intercept[0]) if self._vector else intercept

    @property
    def alpha_(self) -> float | np.ndarray:
        """The strength of each target."""
        alpha: np.ndarray = self.solution.strengths.numpy()
        return float(alpha[0]) if self._vector else alpha

    def predict(self, X: Any) -> Any:
        """x·w + b: an array for an array, and for a tensor a float64 tensor where that is. Of a tensor only the last
        dimension must be that of features."""
        weights, offset, _ = self.solution
        if isinstance(X, Tensor):
            found = X.double() @ weights.to(X.device) + offset.to(X.device)
            return found[..., 0] if self._vector else found
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        return X @ self.coef_.T + self.intercept_

    def r2(self, X: Any, y: Any) -> Any:
        """1 - Σ (y - ŷ)² / Σ (y - ȳ)² on these rows, by target: at most 1, and below 0 worse than their mean."""
        y = y.double() if isinstance(y, Tensor) else np.asarray(y)
        return 1 - ((y - self.predict(X)) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)
