"""Which position, as a class: multinomial logistic regression, its objective scikit-learn's and its solver our own.

scikit-learn's L-BFGS takes the features as they are; here each step is made in a metric in which the loss is nearly
round, so that few are needed. The rows go through in their own dtype; sums of losses are in float64.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from probe.config import check_number, check_size
from probe.device import fast_products
from probe.errors import ProbeError
from probe.limits import current
from probe.position.probes.moments import eigen

MEMORY = 20  # steps that L-BFGS remembers
RENEWALS = (0, 2, 5)  # steps before which the metric is renewed
LOOKED_AT = 4096  # rows that it is renewed from
FLATTEST = 0.2  # the least curvature it sees, in units of that of the uniform prediction, 1 / classes


class Objective:
    """(1/n) Σ -ln p(class | x) + ‖w‖² / (2 C n) over some rows, of W = (w, intercepts); these are not penalised."""

    def __init__(self, x: Float[Tensor, "row feature"], y: Int[Tensor, "row"], penalty: float):
        self.x, self.y, self.penalty = x, y, penalty
        self.n_rows = current().loss_rows
        self.minus_one = x.new_full((self.n_rows, 1), -1.0)

    def __call__(self, W: Float[Tensor, "class column"]) -> tuple[float, Tensor]:
        """The loss, summed in float64, and its gradient."""
        w, intercept = W[:, :-1], W[:, -1]
        gradient, loss, n = torch.zeros_like(W), 0.0, len(self.x)
        of_w = torch.zeros(w.shape, dtype=W.dtype)
        for i in range(0, n, self.n_rows):
            x, y = self.x[i : i + self.n_rows], self.y[i : i + self.n_rows, None]
            p = torch.addmm(intercept, x, w.T).log_softmax(dim=1)
            loss -= float(p.gather(1, y).sum(dtype=torch.float64))
            p.exp_().scatter_add_(1, y, self.minus_one[: len(y)])
            of_w.addmm_(p.T, x)
            gradient[:, -1] += p.sum(0)
        gradient[:, :-1] = of_w
        gradient /= n
        gradient[:, :-1] += self.penalty * w
        return loss / n + 0.5 * self.penalty * float(w.square().sum(dtype=torch.float64)), gradient


class Metric:
    """An approximation of the inverse Hessian: (B ⊗ S + penalty)⁻¹ in the eigenbases of both, S the second moments of
    the features, of mean 0, and B = mean(diag p - p pᵀ) that of the predictions, which is renewed as they change."""

    def __init__(self, x: Float[Tensor, "row feature"], penalty: float):
        values, self.vectors = eigen((x.T @ x / len(x)).double())
        self.values, self.vectors = values.clamp(min=0).to(x.dtype), self.vectors.to(x.dtype)
        self.penalty = penalty
        some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:LOOKED_AT]
        self.some = x[some]

    def renew(self, W: Tensor) -> None:
        p = torch.softmax(self.some @ W[:, :-1].T + W[:, -1], dim=1)
        values, classes = eigen((p.mean(0).diag() - p.T @ p / len(p)).double())
        # Directions of the classes that look flat here need not be so at other rows: their steps are kept short.
        self.flat, self.classes = values.clamp(min=FLATTEST / len(W)).to(W.dtype)[:, None], classes.to(W.dtype)

    def __call__(self, gradient: Tensor) -> Tensor:
        turned = self.classes.T @ gradient
        w = (turned[:, :-1] @ self.vectors) / (self.flat * self.values + self.penalty)
        return self.classes @ torch.cat((w @ self.vectors.T, turned[:, -1:] / self.flat), dim=1)


def minimise(
    objective: Callable[[Tensor], tuple[float, Tensor]], W: Tensor, metric: Metric, tol: float, max_steps: int
) -> tuple[Tensor, int]:
    """L-BFGS in a metric (Nocedal & Wright 2006, algorithm 7.4), until the metric foretells a gain below ``tol``."""
    loss, gradient = objective(W)
    history: list[tuple[Tensor, Tensor, float]] = []
    for step in range(max_steps):
        if step in RENEWALS:
            metric.renew(W)
        direction, shares = gradient.clone(), []
        for s, y, rho in reversed(history):
            shares.append(rho * float((s * direction).sum()))
            direction -= shares[-1] * y
        direction = metric(direction)
        if history:
            _, y, rho = history[-1]
            direction /= rho * float((y * metric(y)).sum())
        for (s, y, rho), share in zip(history, reversed(shares), strict=True):
            direction += (share - rho * float((y * direction).sum())) * s
        slope = float((gradient * direction).sum())
        if slope < 2 * tol:  # half the slope is what a quadratic loss would lose in this step
            return W, step
        length = 1.0
        while True:
            at = W - length * direction
            new_loss, new_gradient = objective(at)
            if new_loss <= loss - 1e-4 * length * slope:
                break
            length /= 2
            if length < 1e-6:  # as deep as the rounding of the loss lets one see
                return W, step
        s, y = at - W, new_gradient - gradient
        if (curvature := float((s * y).sum())) > 0:
            history = [*history[1 - MEMORY :], (s, y, 1 / curvature)]
        W, loss, gradient = at, new_loss, new_gradient
    return W, max_steps


class SoftmaxProbe(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Multinomial logistic regression with an L2 penalty, a scikit-learn estimator.

    It minimises (1/n) Σ -ln p(class | x) + ‖W‖² / (2 C n), ``LogisticRegression``'s objective.

    Args:
        C: the inverse strength of the penalty.
        tol: the gain of one step, in nats per row, below which it stops.
        max_iter: the largest number of steps.

    Attributes:
        coef_, intercept_, classes_: as scikit-learn's, but for two classes too a row for each.
        n_iter_: steps taken.
        loss_: the objective at the solution, in nats per row, computed in float64.
    """

    # What it is made with is unchecked until the fit, as scikit-learn has it.
    def __init__(self, C: Any = 1.0, tol: Any = 2e-5, max_iter: Any = 1000) -> None:
        self.C = C
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any) -> "SoftmaxProbe":
        """Fit to rows and the class of each.

        Raises:
            ProbeError: for a C, tol or max_iter that is none, or a single class.
        """
        check_number("C", self.C)
        check_number("tol", self.tol)
        check_size("max_iter", self.max_iter)
        X, y = validate_data(self, X, y, dtype=[np.float32, np.float64])
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        n_classes = len(self.classes_)
        if n_classes < 2:
            raise ProbeError(f"a classifier wants at least 2 classes, got one class: {self.classes_.tolist()[0]!r}")
        given, label = torch.as_tensor(np.require(X, requirements=["C", "W"])), torch.as_tensor(index)
        mean = given.mean(0, dtype=torch.float64)
        x = given - mean.to(given.dtype)
        penalty = 1 / (self.C * len(x))
        metric = Metric(x, penalty)
        W = x.new_zeros(n_classes, x.shape[1] + 1)
        with fast_products(x.device):
            W, self.n_iter_ = minimise(Objective(x, label, penalty), W, metric, self.tol, self.max_iter)

        W = W.double()
        self.coef_ = W[:, :-1].numpy().copy()
        self.intercept_ = (W[:, -1] - W[:, :-1] @ mean.to(given.dtype).double()).numpy()
        self.loss_ = self._loss(given, label)
        return self

    def _loss(self, x: Tensor, label: Tensor) -> float:
        total, n_rows = 0.0, current().loss_rows
        for i in range(0, len(x), n_rows):
            z = x[i : i + n_rows].double() @ torch.from_numpy(self.coef_.T) + torch.from_numpy(self.intercept_)
            total += float(torch.nn.functional.cross_entropy(z, label[i : i + n_rows], reduction="sum"))
        return (total + float(np.square(self.coef_).sum()) / (2 * self.C)) / len(x)

    def decision_function(self, X: Any) -> np.ndarray:
        """x·w + b of each class; of two classes, the second's less the first's."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        z = X @ self.coef_.T + self.intercept_
        return z[:, 1] - z[:, 0] if len(self.classes_) == 2 else z

    def predict_proba(self, X: Any) -> np.ndarray:
        """p(class | x), a column for each of ``classes_``."""
        z = self.decision_function(X)
        if z.ndim == 1:
            z = np.stack((np.zeros_like(z), z), axis=1)
        z = np.exp(z - z.max(1, keepdims=True))
        return z / z.sum(1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class."""
        z = self.decision_function(X)
        return self.classes_[(z > 0).astype(int) if z.ndim == 1 else z.argmax(1)]
