import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from probe.errors import ProbeError
from probe.extrapolation import fit_log_law, scale_against


def test_the_law_is_the_regression_through_one():
    rng = np.random.default_rng(0)
    s = np.array([1, 2, 3, 4, 6, 8, 16])
    y = 1 + 0.4 * np.log(s) + 0.03 * rng.normal(size=7)
    law = fit_log_law(s.tolist(), y.tolist())
    model = LinearRegression(fit_intercept=False).fit(np.log(s)[:, None], y - 1)
    assert law.slope == pytest.approx(model.coef_[0])
    assert law.r2 == pytest.approx(r2_score(y - 1, model.predict(np.log(s)[:, None])))
    assert law(4) == pytest.approx(1 + law.slope * np.log(4)) and law(1) == 1
    assert law.n == 7 and law.low < 0.4 < law.high


def test_the_papers_scales_give_about_the_papers_law():
    law = fit_log_law([2, 4, 8], [1.2, 1.5, 1.8])  # as they are read off their figure
    assert law.slope == pytest.approx(0.3710, abs=1e-4)
    assert law.low < 0.3973 < law.high


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    s = [2.0, 4.0, 8.0, 16.0]
    laws = [fit_log_law(s, (1 + 0.5 * np.log(s) + 0.02 * rng.normal(size=4)).tolist()) for _ in range(1000)]
    covered = np.mean([law.low <= 0.5 <= law.high for law in laws])
    assert stats.binomtest(round(1000 * covered), 1000, 0.95).pvalue > 1e-3


def test_exact_and_single_points():
    law = fit_log_law([2, 4], [1 + np.log(2), 1 + np.log(4)])
    assert (law.slope, law.r2) == pytest.approx((1, 1)) and law.low == pytest.approx(law.high)
    one = fit_log_law([2], [1.5])
    assert one.slope == pytest.approx(0.5 / np.log(2)) and np.isnan([one.low, one.high, one.r2]).all()


@pytest.mark.parametrize(
    ("s", "y", "said"),
    [
        ([1], [1.2], "at least one extension other than 1 was wanted"),
        ([0, 2], [1, 1.2], "as many scales as extensions, all above 0, were wanted"),
        ([2, 4], [1.2], "as many scales as extensions"),
        ([2], [float("nan")], "as many scales as extensions"),
    ],
)
def test_wrong_points_are_refused(s, y, said):
    with pytest.raises(ProbeError, match=said):
        fit_log_law(s, y)


def test_correlations_are_scipys_with_an_interval_over_heads():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(4, 6))
    y = 0.8 * x + 0.6 * rng.normal(size=(4, 6))
    rows = scale_against(x, y).set_index("metric")
    pearson, spearman = stats.pearsonr(x.ravel(), y.ravel()), stats.spearmanr(x.ravel(), y.ravel())
    assert rows["value"].to_dict() == pytest.approx({"pearson": pearson.statistic, "spearman": spearman.statistic})
    assert rows["p"].to_dict() == pytest.approx({"pearson": pearson.pvalue, "spearman": spearman.pvalue})
    assert ((rows["low"] < rows["value"]) & (rows["value"] < rows["high"])).all() and (rows["n"] == 24).all()
    by_scipy = stats.bootstrap(
        (x.ravel(), y.ravel()), lambda a, b: stats.pearsonr(a, b).statistic, paired=True, vectorized=False,
        method="percentile", n_resamples=1000, random_state=0,
    ).confidence_interval  # fmt: skip
    assert (rows.loc["pearson", "low"], rows.loc["pearson", "high"]) == pytest.approx(tuple(by_scipy), abs=0.06)


def test_what_does_not_vary_is_refused():
    with pytest.raises(ProbeError, match="a scale that differs between heads was wanted, got 1.5 for all"):
        scale_against(np.full(5, 1.5), np.arange(5.0))
    with pytest.raises(ProbeError, match="three heads at least"):
        scale_against(np.arange(2.0), np.arange(2.0))
