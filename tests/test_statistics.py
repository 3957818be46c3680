import math

import pytest
import torch

from probe.statistics import Bootstrap


def test_bootstrap_covers_the_mean_of_a_normal_sample():
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    bootstrap = Bootstrap.draw(40, 4000, 0.95, 0)
    low, high = bootstrap.interval(bootstrap.means(values))
    half = 1.96 * values.std(0, correction=0) / math.sqrt(40)
    torch.testing.assert_close(low, values.mean(0) - half, atol=0.03, rtol=0)
    torch.testing.assert_close(high, values.mean(0) + half, atol=0.03, rtol=0)


@pytest.mark.parametrize("confidence, low, high", [(0.85, 1, 19), (0.89, 1, 19), (0.91, 0, 20), (0.1, 9, 11)])
def test_interval_of_literal_draws_is_rounded_outward(confidence, low, high):
    draws = torch.arange(21.0, dtype=torch.float64)[torch.randperm(21, generator=torch.Generator().manual_seed(0))]
    got = Bootstrap(torch.ones(1, 1, dtype=torch.float64), confidence).interval(draws)
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
