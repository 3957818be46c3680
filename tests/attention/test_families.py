"""Fitted templates: what made a synthetic head is found again, and the fits are the minima that they claim to be."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch

from probe.attention import TEMPLATES
from probe.attention.distance_family import RIDGE, DistanceMass, descend, fit, pattern_from_bias
from probe.attention.log_odds import fit_log_odds
from probe.attention.mixtures import NO_SINK, TOLERANCE, SinkMixture, fit_sink_mixture
from probe.errors import ProbeError
from probe.limits import limits
from probe.models.encodings import t5_bucket

FIXED = ("uniform", "previous_token", "diagonal", "first_token", "alibi", "t5")
FITTED = [name for name in TEMPLATES if name not in FIXED]


def of_scores(scores):
    n = scores.shape[-1]
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf).softmax(-1)


def random_pattern(batch, head, n, seed=0, spread=2.0):
    return of_scores(spread * torch.randn(batch, head, n, n, generator=torch.Generator().manual_seed(seed)).double())


def with_sink(weight, kernel):
    """π δ₀ + (1 - π) K for each head."""
    weight = torch.as_tensor(weight, dtype=torch.float64)[:, None]
    mixed = (1 - weight[..., None]) * kernel
    mixed[..., 0] += weight
    return mixed


DISTANCE = torch.arange(40, dtype=torch.float64)


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 0.7, 2.0])
def test_exponents_are_recovered(exponent):
    pattern = pattern_from_bias((-exponent * (1 + DISTANCE).log())[None])[None]
    assert float(TEMPLATES["power_law"](pattern).parameters["exponent"]) == pytest.approx(exponent, abs=1e-6)


@pytest.mark.parametrize("width, log_odds", [(1, 2.0), (7, 3.5), (7, -1.0), (39, 1.0)])
def test_windows_are_recovered(width, log_odds):
    pattern = pattern_from_bias(log_odds * DISTANCE.lt(width)[None].double())[None]
    fitted = TEMPLATES["window"](pattern)
    assert fitted.parameters["width"].tolist() == [width]
    assert float(fitted.parameters["log_odds"]) == pytest.approx(log_odds, abs=1e-5)
    torch.testing.assert_close(fitted.pattern, pattern[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name, distance", [("previous_token_leaky", 1), ("diagonal_leaky", 0)])
@pytest.mark.parametrize("log_odds", [-2.0, 0.0, 4.0])
def test_leaks_are_recovered(name, distance, log_odds):
    pattern = pattern_from_bias(log_odds * DISTANCE.eq(distance)[None].double())[None]
    fitted = TEMPLATES[name](pattern)
    assert float(fitted.parameters["log_odds"]) == pytest.approx(log_odds, abs=1e-6)
    assert fitted.pattern[0, 0, 0] == 1
    # What is left of the row is shared evenly: a literal, (1 - p)/t with p = e^θ/(e^θ + t).
    favoured = math.exp(log_odds) / (math.exp(log_odds) + 20)
    row = torch.full((21,), (1 - favoured) / 20, dtype=torch.float64)
    row[20 - distance] = favoured
    torch.testing.assert_close(fitted.pattern[0, 20, :21], row, atol=1e-8, rtol=0)


@pytest.mark.parametrize("log_odds", [-1.0, 0.0, 3.0])
def test_sinks_are_recovered(log_odds):
    row = torch.arange(30, dtype=torch.float64)
    pattern = torch.ones(30, 30, dtype=torch.float64).tril() / (math.exp(log_odds) + row)[:, None]
    pattern[:, 0] *= math.exp(log_odds)
    fitted = TEMPLATES["first_token_sink"](pattern[None, None])
    assert float(fitted.parameters["log_odds"]) == pytest.approx(log_odds, abs=1e-7)
    torch.testing.assert_close(fitted.pattern[0], pattern, atol=1e-7, rtol=0)


def test_rotary_kernels_are_recovered():
    frequency = 10000.0 ** (-torch.arange(16, dtype=torch.float64) / 16)
    coefficients = torch.randn(3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pattern = pattern_from_bias(coefficients @ torch.cos(DISTANCE * frequency[:, None]))[None]
    fitted = TEMPLATES["rotary_fitted"](pattern)
    torch.testing.assert_close(fitted.pattern, pattern[0], atol=1e-5, rtol=0)
    assert fitted.parameters["coefficients"].shape == (3, 16)
    short = slice(0, 4)  # waves of 6 to 35 tokens; longer ones are parabolas here
    torch.testing.assert_close(fitted.parameters["coefficients"][:, short], coefficients[:, short], atol=1e-3, rtol=0)


@pytest.mark.parametrize("weights", [[0.0, 0.1, 0.5, 0.9]])
def test_mixtures_are_recovered(weights):
    slopes = torch.tensor([0.05, 0.2, 1.0, 0.3], dtype=torch.float64)
    pattern = with_sink(weights, pattern_from_bias(-slopes[:, None] * DISTANCE))[None]
    fitted = TEMPLATES["sink_alibi"](pattern)
    assert fitted.parameters["sink_weight"].tolist() == pytest.approx(weights, abs=1e-5)
    torch.testing.assert_close(fitted.parameters["slope"], slopes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fitted.pattern, pattern[0], atol=1e-6, rtol=0)
    assert fitted.n_parameters == 2

    table = torch.randn(4, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pattern = with_sink(weights, pattern_from_bias(table[:, t5_bucket(DISTANCE.long(), 32)]))[None]
    fitted = TEMPLATES["sink_t5"](pattern)
    assert fitted.parameters["sink_weight"].tolist() == pytest.approx(weights, abs=1e-4)
    # Each bucket but the furthest, which only few rows see and among them always the sink's key.
    near = slice(0, int(t5_bucket(DISTANCE.long(), 32)[-1]))
    biases = fitted.parameters["bucket_bias"][:, near]
    want = table[:, near]
    torch.testing.assert_close(
        biases - biases.mean(1, keepdim=True), want - want.mean(1, keepdim=True), atol=1e-2, rtol=0
    )
    torch.testing.assert_close(fitted.pattern, pattern[0], atol=1e-5, rtol=0)


# The others' biases may differ by more than the 745 nats at which float64 ends.
@pytest.mark.parametrize(
    "name", ["previous_token_leaky", "diagonal_leaky", "first_token_sink", "window", "t5_fitted", "sink_t5"]
)
def test_no_visible_key_is_quite_without_attention(name):
    for target in ("first_token", "diagonal", "previous_token"):
        pattern = TEMPLATES[target](torch.zeros(1, 1, 64, 64)).pattern[None]
        fitted = TEMPLATES[name](pattern).pattern[0]
        assert (fitted[torch.ones(64, 64, dtype=torch.bool).tril()] > 0).all()


@pytest.mark.parametrize(
    "name, at_1, at_2, at_20",
    [
        ("previous_token_leaky", 0, 1, 1),
        ("diagonal_leaky", 0, 1, 1),
        ("first_token_sink", 0, 1, 1),
        ("alibi_fitted", 0, 1, 1),
        ("power_law", 0, 1, 1),
        ("window", 0, 1, 2),
        ("sink_alibi", 0, 1, 2),
        ("t5_fitted", 0, 1, 16 + 2 - 1),
        ("sink_t5", 0, 1, 16 + 2),
    ],
)
def test_numbers_of_parameters(name, at_1, at_2, at_20):
    assert [TEMPLATES[name](random_pattern(1, 2, n)).n_parameters for n in (1, 2, 20)] == [at_1, at_2, at_20]


def mean_kl(pattern, lengths, template):
    """The mean over the valid rows of KL(observed ‖ template), row by row; one head."""
    rows = [
        (torch.xlogy(p, p) - torch.xlogy(p, q)).sum()
        for sequence, length in zip(pattern, lengths.tolist(), strict=True)
        for p, q in zip(sequence[:length], template, strict=False)
    ]
    return torch.stack(rows).mean()


def test_the_window_is_the_best_of_all_widths():
    pattern, lengths = random_pattern(3, 2, 12, seed=3), torch.tensor([12, 5, 9])
    fitted = TEMPLATES["window"](pattern, lengths)
    for head in range(2):
        best = min(
            scipy.optimize.minimize_scalar(
                lambda theta, w=width, h=head: float(
                    mean_kl(pattern[:, h], lengths, pattern_from_bias(theta * (DISTANCE[:12] < w)[None])[0])
                ),
                bounds=(-20, 20),
                options={"xatol": 1e-9},
            ).fun
            for width in range(1, 13)
        )
        assert float(mean_kl(pattern[:, head], lengths, fitted.pattern[head])) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("width", [1, 4, 20])
def test_log_odds_are_those_of_the_general_fit(width):
    observed = DistanceMass.of(random_pattern(2, 3, 20, seed=5), torch.tensor([20, 11]))
    inside = (DISTANCE[:20] < width).double()
    favoured = torch.arange(1, 21).clamp(max=width)
    theta, value = fit_log_odds(favoured, observed.rows, observed.mass @ inside)
    torch.testing.assert_close(theta, fit(observed, inside[:, None])[:, 0], atol=1e-7, rtol=0)
    assert value.shape == (3,)


def test_the_sink_minimises_the_stated_objective():
    pattern, lengths = random_pattern(2, 1, 12, seed=6), torch.tensor([12, 7])
    fitted = TEMPLATES["first_token_sink"](pattern, lengths)

    def lost(beta):
        scores = torch.zeros(12, 12, dtype=torch.float64)
        scores[:, 0] = beta
        return float(mean_kl(pattern[:, 0], lengths, of_scores(scores)))

    oracle = scipy.optimize.minimize_scalar(lost, bounds=(-20, 20), options={"xatol": 1e-9})
    assert float(fitted.parameters["log_odds"]) == pytest.approx(oracle.x, abs=1e-5)


def stated_mixture(parameters, pattern, lengths, features):
    """Mean over rows of KL(observed ‖ mixture) and the ridge, row by row; one head."""
    weight, bias = parameters[0].sigmoid(), features @ parameters[1:]
    rows = []
    for t in range(pattern.shape[-1]):
        row = (1 - weight) * bias[: t + 1].flip(0).softmax(0)
        rows.append(torch.cat([row[:1] + weight, row[1:]]))
    kl = [
        (torch.xlogy(p[: t + 1], p[: t + 1]) - p[: t + 1] * rows[t].log()).sum()
        for sequence, length in zip(pattern, lengths.tolist(), strict=True)
        for t, p in enumerate(sequence[:length])
    ]
    ridge = (parameters[0] - NO_SINK).square() + parameters[1:].square().sum()
    return torch.stack(kl).mean() + RIDGE / 2 * ridge


def mixture_problem(seed, n=14):
    """Heads of which a sink explains a part: content, a slope, and more on key 0."""
    scores = torch.randn(3, 4, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    index = torch.arange(n)
    scores = scores - 0.3 * (index[:, None] - index)
    return with_sink([0.05, 0.2, 0.4, 0.7], of_scores(scores)), torch.tensor([n, n // 2, n - 3])


BUCKETS = torch.nn.functional.one_hot(t5_bucket(torch.arange(14), 32)).double()


@pytest.mark.parametrize("features", [DISTANCE[:14, None], BUCKETS], ids=["alibi", "t5"])
def test_the_mixture_is_a_minimum_of_the_stated_objective(features):
    pattern, lengths = mixture_problem(0)
    weight, theta = fit_sink_mixture(DistanceMass.of(pattern, lengths), features)
    for head in (1, 3):
        stated = lambda x, h=head: stated_mixture(x, pattern[:, h], lengths, features)  # noqa: E731
        found = torch.cat([weight[head].logit()[None], theta[head]]).requires_grad_()
        (gradient,) = torch.autograd.grad(stated(found), found)
        value = float(stated(found.detach()))
        assert gradient.abs().max() < 1e-6

        def with_gradient(x, stated=stated):
            x = torch.tensor(x, requires_grad=True)
            y = stated(x)
            y.backward()
            return y.item(), x.grad.numpy()

        # From other places: no better minimum.
        for seed in range(2):
            start = np.random.default_rng(seed).normal(size=len(found))
            oracle = scipy.optimize.minimize(with_gradient, start, jac=True, method="L-BFGS-B", tol=1e-12)
            assert value <= oracle.fun + 1e-8


@pytest.mark.parametrize("features", [DISTANCE[:14, None], BUCKETS], ids=["alibi", "t5"])
def test_the_descent_of_a_mixture_is_monotone_and_its_derivatives_are_right(features):
    pattern, lengths = mixture_problem(1)
    mixture = SinkMixture(DistanceMass.of(pattern, lengths), features)
    start = torch.randn(4, 1 + features.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradient, _ = mixture.step(start)
    entropy = [stated_mixture(s, pattern[:, h], lengths, features) for h, s in enumerate(start)]
    offset = torch.stack(entropy) - mixture.objective(start)[0]  # of the observed rows: the same wherever one stands
    for head, x in enumerate(start):
        x = x.clone().requires_grad_()
        stated_mixture(x, pattern[:, head], lengths, features).backward()
        torch.testing.assert_close(gradient[head], x.grad, atol=1e-10, rtol=0)

    value, n_steps = mixture.objective(start)[0], 0
    for parameters, reached in descend(start, mixture.objective, mixture.step, TOLERANCE):
        assert (reached <= value + 1e-14).all()
        stated = torch.stack([stated_mixture(x, pattern[:, h], lengths, features) for h, x in enumerate(parameters)])
        torch.testing.assert_close(stated - offset, reached, atol=1e-11, rtol=0)
        value, n_steps = reached, n_steps + 1
    assert 1 < n_steps < 60


def test_a_descent_that_does_not_end_says_so():
    with limits(descent_steps=2), pytest.raises(ArithmeticError, match="did not converge in 2 steps"):
        fit(DistanceMass.of(random_pattern(1, 1, 20)), DISTANCE[:20, None])


@pytest.mark.parametrize("name", FITTED)
def test_padding_changes_no_fit(name):
    pattern, lengths = random_pattern(2, 2, 12, seed=6), torch.tensor([7, 5])
    garbage = pattern.clone()
    garbage[0, :, 7:], garbage[1, :, 5:] = math.nan, 9.0
    assert torch.equal(TEMPLATES[name](garbage, lengths).pattern, TEMPLATES[name](pattern, lengths).pattern)


@pytest.mark.parametrize(
    "spoil, got",
    [
        (lambda p: p.mul_(2), "sum to 2"),
        (lambda p: p[0, 1, 3, 0].fill_(math.nan), "head 1 sum to nan"),
        (lambda p: p.copy_(p.flip(-1)), "head 0 sum to"),
    ],
)
def test_fits_refuse_what_is_no_pattern(spoil, got):
    pattern = random_pattern(1, 2, 6)
    spoil(pattern)
    with pytest.raises(ProbeError, match=f"fitted to causal rows that sum to 1, but those of .*{got}"):
        TEMPLATES["alibi_fitted"](pattern)
