import itertools

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
    assert law.n == 6 and law.low < 0.4 < law.high  # the point at 1 says nothing of the slope


def test_the_papers_scales_give_about_the_papers_law():
    law = fit_log_law([2, 4, 8], [1.2, 1.5, 1.8])  # as they are read off their figure
    assert law.slope == pytest.approx(0.3710, abs=1e-4)
    assert law.low < 0.3973 < law.high


@pytest.mark.parametrize("s", [[2.0, 4.0, 8.0, 16.0], [1.0, 1.0, 1.0, 2.0, 4.0, 8.0]])
def test_the_interval_covers_as_often_as_it_says(s):
    """With points at 1, too, where λ is 1 by construction."""
    rng, varies = np.random.default_rng(1), np.array(s) != 1
    noise = [0.02 * rng.normal(size=len(s)) * varies for _ in range(1000)]
    laws = [fit_log_law(s, (1 + 0.5 * np.log(s) + each).tolist()) for each in noise]
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
    assert rows["p"].to_dict() == pytest.approx({"pearson": pearson.pvalue, "spearman": spearman.pvalue}, abs=2e-3)
    assert ((rows["low"] < rows["value"]) & (rows["value"] < rows["high"])).all() and (rows["n"] == 24).all()
    assert tuple(rows.loc["pearson", ["low", "high"]]) == pytest.approx(tuple(pearson.confidence_interval(0.95)))
    # Bonett & Wright 2000 by hand: the standard error of artanh r is √((1 + r²/2) / (n - 3)).
    half = 1.959964 * np.sqrt((1 + spearman.statistic**2 / 2) / 21)
    by_hand = np.tanh(np.arctanh(spearman.statistic) + np.array([-half, half]))
    assert tuple(rows.loc["spearman", ["low", "high"]]) == pytest.approx(tuple(by_hand), abs=1e-6)


def test_the_p_of_few_heads_is_that_of_all_their_pairings():
    x, y = np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.0, 3.0, 2.0, 5.0])
    each = [abs(stats.pearsonr(x, order).statistic) for order in itertools.permutations(y)]
    wanted = np.mean([r >= abs(stats.pearsonr(x, y).statistic) - 1e-12 for r in each])
    assert scale_against(x, y).set_index("metric").loc["pearson", "p"] == pytest.approx(wanted)


def test_what_does_not_vary_is_refused():
    with pytest.raises(ProbeError, match="a scale that differs between heads was wanted, got 1.5 for all"):
        scale_against(np.full(5, 1.5), np.arange(5.0))
    with pytest.raises(ProbeError, match="three heads at least"):
        scale_against(np.arange(2.0), np.arange(2.0))
