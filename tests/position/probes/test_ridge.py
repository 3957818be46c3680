import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import mean_squared_error, r2_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from probe.errors import ProbeError
from probe.position import LinearProbe, Moments, ridge_path
from probe.position.probes.moments import eigen

ALPHAS = (0.1, 3.0, 100.0)


def data(n=400, d=24, targets=3, mean=3.0, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + mean * rng.normal(size=d)
    Y = X[:, :targets] + X @ rng.normal(size=(d, targets)) / 5 + rng.normal(size=(n, targets)) - 7
    return X.astype(dtype), Y


def moments(X, Y):
    return Moments.of(torch.as_tensor(X), torch.as_tensor(Y))


# ---- moments


def test_moments_are_sums_over_the_rows():
    X, Y = data()
    found, Z = moments(X, Y), np.hstack(data())
    assert found.n == 400
    np.testing.assert_allclose(torch.cat(found.means), Z.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.scatter, 400 * np.cov(Z.T, bias=True), rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 399), st.floats(-1e3, 1e3))
def test_moments_add_and_subtract_and_do_not_care_where_their_origin_is(cut, shift):
    X, Y = data()
    whole, first, rest = moments(X, Y), moments(X[:cut], Y[:cut]), moments(X[cut:], Y[cut:])
    moved = whole.moved_to(whole.origin + shift)
    for a, b in ((first + rest, whole), (whole - first + first, whole), (moved, whole)):
        assert a.n == b.n
        np.testing.assert_allclose(a.scatter, b.scatter, rtol=1e-7, atol=1e-6 * (1 + shift**2 * 1e-6))
        np.testing.assert_allclose(torch.cat(a.means), torch.cat(b.means), rtol=1e-9, atol=1e-9)


def test_the_errors_of_rows_that_are_gone():
    X, Y = data()
    probe = Ridge(2.0).fit(X[:200], Y[:200])
    held = moments(X[200:], Y[200:])
    coef, intercept = torch.tensor(probe.coef_.T), torch.tensor(probe.intercept_)
    predicted = probe.predict(X[200:])
    mse = mean_squared_error(Y[200:], predicted, multioutput="raw_values")
    np.testing.assert_allclose(held.squared_errors(coef, intercept) / held.n, mse, rtol=1e-9)
    np.testing.assert_allclose(
        held.r2(coef, intercept), r2_score(Y[200:], predicted, multioutput="raw_values"), rtol=1e-9
    )


# ---- solutions, beside scikit-learn's


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 1e3])
def test_coefficients_are_ridges(alpha):
    X, Y = data()
    ours, theirs = LinearProbe((alpha,)).fit(X, Y), Ridge(alpha).fit(X, Y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-8)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-8)
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-8)
    assert ours.score(X, Y) == pytest.approx(theirs.score(X, Y), rel=1e-10)


def test_all_strengths_come_from_one_decomposition():
    X, Y = data()
    coef, intercept = ridge_path(moments(X, Y), ALPHAS, standardize=True)
    for alpha, w, b in zip(ALPHAS, coef, intercept, strict=True):
        theirs = make_pipeline(StandardScaler(), Ridge(alpha)).fit(X, Y)
        np.testing.assert_allclose(X @ w.numpy() + b.numpy(), theirs.predict(X), rtol=1e-8)


def test_fewer_rows_than_dimensions():
    X, Y = data(n=10, d=24)
    np.testing.assert_allclose(LinearProbe((0.5,)).fit(X, Y).coef_, Ridge(0.5).fit(X, Y).coef_, rtol=1e-8)
    # Without a penalty: the shortest of those that fit.
    shortest = np.linalg.pinv(X - X.mean(0)) @ (Y - Y.mean(0))
    np.testing.assert_allclose(LinearProbe((0.0,)).fit(X, Y).coef_, shortest.T, rtol=1e-7)


def test_a_constant_feature_is_not_read():
    X, Y = data()
    X[:, 3] = 0.1  # its mean is not exactly 0.1
    probe = LinearProbe((1e-6,), standardize=True).fit(X, Y)
    assert (probe.coef_[:, 3] == 0).all() and np.isfinite(probe.coef_).all()


@pytest.mark.parametrize("noise", [0.1, 30.0])
def test_the_strength_is_ridgecvs(noise):
    rng = np.random.default_rng(1)
    X, Y = data(n=90)
    y, groups = Y[:, 0] + noise * rng.normal(size=90), np.repeat(np.arange(18), 5)
    alphas = np.logspace(-3, 4, 15)
    splits = [(np.flatnonzero(groups % 5 != f), np.flatnonzero(groups % 5 == f)) for f in range(5)]
    assert all(not set(groups[a]) & set(groups[b]) for a, b in splits)
    theirs = RidgeCV(alphas, cv=splits, scoring="neg_mean_squared_error").fit(X, y)
    ours = LinearProbe(alphas).fit(X, y, groups=groups)
    assert ours.alpha_ == pytest.approx(theirs.alpha_)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-7)
    again = [moments(X[test], y[test, None]) for _, test in splits]
    np.testing.assert_allclose(LinearProbe.from_moments(*again, alphas=alphas).coef_[0], theirs.coef_, rtol=1e-7)


def test_rows_that_stream_by_give_what_all_rows_give():
    X, Y = data()
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    groups = np.arange(400) // 8 % 5
    whole = LinearProbe(ALPHAS, standardize=True).fit(X, Y, groups)
    streamed = LinearProbe(ALPHAS, standardize=True)
    for start in range(0, 400, 40):
        for fold in range(5):
            rows = start + np.flatnonzero(groups[start : start + 40] == fold)
            streamed.update(x[rows], y[rows], fold) if start % 80 else streamed.update(X[rows], Y[rows], fold)
        assert streamed.predict(x[:3]).shape == (3, 3)  # what it knows so far
    assert streamed.alpha_.tolist() == whole.alpha_.tolist()
    np.testing.assert_allclose(streamed.coef_, whole.coef_, rtol=1e-9)
    np.testing.assert_allclose(streamed.predict(x), whole.predict(X), rtol=1e-9)
    np.testing.assert_allclose(streamed.r2(x, y), r2_score(Y, whole.predict(X), multioutput="raw_values"), rtol=1e-9)
    assert streamed.r2(X, Y).mean() == pytest.approx(whole.score(X, Y), rel=1e-9)
    # A new fit forgets what was seen.
    np.testing.assert_allclose(streamed.fit(x, y[:, 0], groups).coef_, whole.coef_[0], rtol=1e-9)


def test_tensors_of_any_shape_are_read_where_they_are():
    X, Y = data()
    probe = LinearProbe((2.0,)).fit(torch.from_numpy(X), torch.from_numpy(Y[:, 0]))
    found = probe.predict(torch.from_numpy(X).view(20, 20, 24).float())
    assert found.shape == (20, 20) and found.dtype == torch.float64 and isinstance(probe.alpha_, float)
    np.testing.assert_allclose(found.flatten(), Ridge(2.0).fit(X, Y[:, 0]).predict(X.astype(np.float32)), rtol=1e-6)


def test_with_one_fold_the_strength_in_the_middle_is_taken():
    X, Y = data()
    one = LinearProbe.from_moments(moments(X, Y), alphas=(100.0, 0.1, 3.0))
    assert one.alpha_.tolist() == [3.0] * 3
    np.testing.assert_allclose(one.coef_, Ridge(3.0).fit(X, Y).coef_, rtol=1e-8)


@pytest.mark.parametrize("standardize", [False, True])
def test_without_a_penalty_directions_that_rounding_made_are_left_out(standardize):
    """Float32 rows of rank 10 in 24 features: what is left of the other 14 directions is rounding, which least squares
    would read with coefficients of millions."""
    X, _ = data()
    X = X[:, :10] @ np.random.default_rng(3).normal(size=(10, 24))
    y = X @ np.arange(24.0) + np.random.default_rng(4).normal(size=400)
    exact = np.linalg.pinv(X - X.mean(0), rcond=1e-8) @ (y - y.mean())
    probe = LinearProbe((0.0,), standardize=standardize).fit(X.astype(np.float32), y)
    centred = X - X.mean(0)
    np.testing.assert_allclose(centred @ probe.coef_, centred @ exact, atol=1e-3 * y.std())
    assert np.linalg.norm(probe.coef_) < 10 * np.linalg.norm(exact)


def test_folds_are_of_groups():
    # Each group has features of its own that tell nothing: within groups they seem to.
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 6)
    X, y = rng.normal(size=(30, 20))[groups], rng.normal(size=30)[groups] + 0.1 * rng.normal(size=180)
    alphas = (1e-3, 1e4)
    assert LinearProbe(alphas).fit(X, y, groups=groups).alpha_ == 1e4
    assert LinearProbe(alphas).fit(X, y).alpha_ == 1e-3
    theirs = RidgeCV(alphas, cv=list(GroupKFold(5).split(X, y, groups)), scoring="neg_mean_squared_error").fit(X, y)
    assert theirs.alpha_ == 1e4


def test_float32_activations_give_what_float64_gives():
    X, Y = data(n=20_000, d=48, mean=20.0, dtype=np.float32)
    exact = Ridge(1.0, solver="svd").fit(X.astype(np.float64), Y).coef_
    ours = LinearProbe((1.0,)).fit(X, Y)
    theirs = Ridge(1.0).fit(X, Y.astype(np.float32))
    assert theirs.coef_.dtype == np.float32
    away = [np.linalg.norm(p.coef_ - exact) / np.linalg.norm(exact) for p in (ours, theirs)]
    assert away[0] < 1e-9 < 1e-5 < away[1]


@pytest.mark.parametrize("seed", range(4))
def test_float32_products_lie_nearer_to_float64_than_scikit_learns_float32(seed):
    X, Y = data(n=20_000, d=32, mean=20.0, dtype=np.float32, seed=seed)
    exact = Ridge(1.0, solver="svd").fit(X.astype(np.float64), Y)
    streamed = LinearProbe.from_moments(moments(X, Y))
    theirs = Ridge(1.0).fit(X, Y.astype(np.float32))
    away = [np.linalg.norm(p.coef_ - exact.coef_) / np.linalg.norm(exact.coef_) for p in (streamed, theirs)]
    assert away[0] < away[1] and away[0] < 1e-2
    assert abs(streamed.score(X, Y) - exact.score(X, Y)) < 1e-7


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")  # of the check of array APIs, switched off
@pytest.mark.parametrize("alphas", [(1.0,), (0.1, 10.0)])
def test_it_is_a_scikit_learn_estimator(alphas):
    check_estimator(LinearProbe(alphas))


def test_bad_input_is_one_clear_line():
    X, Y = data()
    with pytest.raises(ProbeError, match="alphas must be numbers of at least 0, got \\[-1.0\\]"):
        LinearProbe((-1.0,)).fit(X, Y)
    with pytest.raises(ProbeError, match="a choice of strengths needs at least 2 groups of samples, got n_samples=400"):
        LinearProbe((1.0, 2.0)).fit(X, Y, groups=np.zeros(400))
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    with pytest.raises(ProbeError, match="rows must have 24 features, as those before, got 23"):
        LinearProbe().update(x, y).update(x[:, :23], y)
    with pytest.raises(ProbeError, match="needs finite hidden states and targets, got NaN or infinity"):
        LinearProbe().fit(x / 0, y)
    with pytest.raises(ProbeError, match="moments of 27 columns and of 26 cannot be added"):
        moments(X, Y) + moments(X, Y[:, :2])
    with pytest.raises(ProbeError, match="target 'b' must vary over the training tokens, got one value"):
        moments(X, np.hstack((Y[:, :1], np.full((400, 1), 0.1)))).checked("here", ["a", "b"])
    X[3, 3] = np.nan
    with pytest.raises(ProbeError, match="hidden states at 'here' must be finite"):
        moments(X, Y).checked("here", list("abc"))


def test_a_matrix_with_hundreds_of_equal_eigenvalues_has_them_all(monkeypatch):
    """Where LAPACK gives up, as it does on such matrices, the singular values are found instead."""
    x = torch.zeros(500, 256, dtype=torch.float64)
    x[:, :3] = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted, _ = eigen(x.T @ x)

    def gives_up(matrix):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    values, vectors = eigen(x.T @ x)
    torch.testing.assert_close(values, wanted, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(vectors * values @ vectors.T, x.T @ x, atol=1e-9, rtol=1e-9)
