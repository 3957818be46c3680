import math

import numpy as np
import pytest
import torch
from scipy import stats

from probe.statistics import (
    Bootstrap,
    expanded_tail,
    jackknife,
    jackknife_variance,
    over_trainings,
    p_value,
    student,
)


def test_bootstrap_covers_the_mean_of_a_normal_sample():
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    bootstrap = Bootstrap.draw(40, 4000, 0.95, 0)
    low, high = bootstrap.interval(bootstrap.means(values))
    half = 1.96 * values.std(0, correction=0) / math.sqrt(40)
    torch.testing.assert_close(low, values.mean(0) - half, atol=0.03, rtol=0)
    torch.testing.assert_close(high, values.mean(0) + half, atol=0.03, rtol=0)


@pytest.mark.parametrize("confidence, low, high", [(0.85, 1, 19), (0.89, 1, 19), (0.91, 0, 20), (0.08, 9, 11)])
def test_interval_of_literal_draws_is_rounded_outward(confidence, low, high):
    draws = torch.arange(21.0, dtype=torch.float64)[torch.randperm(21, generator=torch.Generator().manual_seed(0))]
    got = Bootstrap(torch.full((1, 10_000), 1e-4, dtype=torch.float64), confidence).interval(draws)
    assert (got[0].item(), got[1].item()) == (low, high)


def test_bootstrap_draws_are_whole_numbers_of_sequences():
    bootstrap = Bootstrap.draw(7, 30, 0.9, 3)
    counts = bootstrap.weights * 7
    torch.testing.assert_close(counts, counts.round())
    torch.testing.assert_close(bootstrap.weights.sum(1), torch.ones(30, dtype=torch.float64))


def test_bootstrap_with_one_infinite_sequence():
    values = torch.tensor([1.0, 2.0, math.inf], dtype=torch.float64)
    bootstrap = Bootstrap.draw(3, 500, 0.95, 0)
    means = bootstrap.means(values)
    assert torch.equal(means.isinf(), bootstrap.weights[:, 2] > 0) and not means.isnan().any()
    low, high = bootstrap.interval(means)
    assert 1 <= float(low) <= 2 and float(high) == math.inf


@pytest.mark.parametrize("n", [3, 10])
def test_students_interval_is_scipys_and_a_single_value_has_none(n):
    x = np.random.default_rng(n).normal(size=n)
    found = student(x, 0.9)
    wanted = stats.t.interval(0.9, n - 1, loc=x.mean(), scale=stats.sem(x))
    assert (found.value, found.low, found.high) == pytest.approx((x.mean(), *wanted)) and found.kind == "trainings"
    single = student([2.0], 0.9)
    assert (single.value, single.kind) == (2.0, "none") and math.isnan(single.low) and math.isnan(single.high)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(0).normal(size=12)
    left_out = [np.delete(x, i).mean() for i in range(12)]
    assert jackknife_variance(left_out) == pytest.approx(stats.sem(x) ** 2)
    found, wanted = jackknife(x.mean(), left_out, 0.95), student(x, 0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high)) and found.kind == "sequences"
    assert jackknife(1.0, [1.0, math.nan], 0.95).kind == "none"


def test_variances_over_trainings_and_sequences_add_up():
    x, draws = np.array([1.0, 2.0, 4.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    left_out = [[np.delete(x, i).mean() for i in range(3)]]
    found = over_trainings(x.mean(), left_out, draws, 5, 0.95)
    error = math.sqrt(stats.sem(x) ** 2 + 1.25 * 5 / 4)  # the draws' variance, of 5 sequences
    wanted = stats.t.interval(0.95, 2, loc=x.mean(), scale=error)
    assert (found.low, found.high) == pytest.approx(wanted) and found.kind == "both"
    alone = over_trainings(x.mean(), left_out, draws, 1, 0.95)  # one sequence has no variance
    assert (alone.low, alone.high) == pytest.approx(stats.t.interval(0.95, 2, loc=x.mean(), scale=stats.sem(x)))
    assert alone.kind == "trainings"
    assert over_trainings(math.inf, [[1.0, math.inf]], draws, 5, 0.95).kind == "none"


def test_the_expanded_percentile_of_a_normal_mean_is_its_t_interval():
    """Draws of a mean are about normal with the variance (n - 1)/n of the unbiased one: where the t interval ends, the
    share of draws beyond is Φ(-t √(n / (n - 1)))."""
    values = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bootstrap = Bootstrap.draw(8, 40_000, 0.95, 0)
    low, high = bootstrap.interval(bootstrap.means(values))
    wanted = stats.t.interval(0.95, 7, loc=values.mean(), scale=stats.sem(values))
    assert (float(low), float(high)) == pytest.approx(wanted, abs=0.25)  # draws of 8 values are only about normal
    plain = bootstrap.means(values).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert low < plain[0] and high > plain[1]
    assert expanded_tail(0.95, 10**6) == pytest.approx(0.025, abs=1e-5)


def test_p_counts_the_effect_among_its_controls():
    assert p_value(3.0, [1.0, 2.0, 3.0, 4.0]) == 3 / 5
    assert p_value(9.0, [0.0] * 19) == 1 / 20
    assert math.isnan(p_value(1.0, []))
