import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.utils.estimator_checks import check_estimator

from probe.errors import ProbeError
from probe.position import SoftmaxProbe


def data(n=2000, d=20, n_classes=7, dtype=np.float64, seed=0):
    """Classes along a line, on features of very different sizes."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, n_classes, n)
    X = rng.normal(size=(n, d)) + np.outer(y, rng.normal(size=d)) / 3
    return (X @ rng.normal(size=(d, d)) * np.logspace(0, -2, d) + 5).astype(dtype), y


def objective(probe, X, y, C):
    """Written with scikit-learn's log loss."""
    return log_loss(y, probe.predict_proba(X)) + np.square(probe.coef_).sum() / (2 * C * len(y))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # theirs; the lower loss is what is asked
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_the_loss_is_no_higher_than_logistic_regressions(C, dtype):
    X, y = data(dtype=dtype)
    ours = SoftmaxProbe(C=C, tol=1e-7).fit(X, y)
    theirs = LogisticRegression(C=C, max_iter=5000).fit(X, y)
    assert ours.loss_ == pytest.approx(objective(ours, X.astype(np.float64), y, C), abs=1e-9)
    assert ours.loss_ <= objective(theirs, X.astype(np.float64), y, C) + 1e-6


def test_the_solution_is_logistic_regressions():
    X, y = data()
    ours = SoftmaxProbe(tol=1e-14).fit(X, y)
    # Newton's own steps end at the rounding of float64 on every processor; line searches warn on some.
    theirs = LogisticRegression(solver="newton-cholesky", tol=1e-8).fit(X.astype(np.float64), y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-4 * np.abs(theirs.coef_).max())
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-5)
    assert ours.score(X, y) == pytest.approx(theirs.score(X, y), abs=1e-3)


def test_two_classes_are_the_binary_problem():
    # Two rows of coefficients w and -w have half the penalty of their difference.
    X, y = data(n_classes=2)
    ours = SoftmaxProbe(C=1.0, tol=1e-12).fit(X, y)
    theirs = LogisticRegression(C=2.0, tol=1e-10, max_iter=5000).fit(X, y)
    np.testing.assert_allclose(ours.coef_[1] - ours.coef_[0], theirs.coef_[0], atol=1e-3)
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), atol=1e-3)


def test_it_is_a_scikit_learn_estimator():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(SoftmaxProbe())


def test_bad_input_is_one_clear_line():
    X, y = data(n=20)
    with pytest.raises(ProbeError, match="at least 2 classes, got one class: 3"):
        SoftmaxProbe().fit(X, np.full(20, 3))
    with pytest.raises(ProbeError, match="C must be a number above 0, got 0"):
        SoftmaxProbe(C=0).fit(X, y)
