import math

import numpy as np
import pytest
import scipy.optimize
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from probe.attention import TEMPLATES, FittedTemplate, TemplateContext, available_templates, check_pattern
from probe.attention.distance_family import RIDGE, DistanceMass, by_distance, fit, pattern_from_bias
from probe.errors import ProbeError
from probe.models.encodings import T5, Alibi

N_HEADS = 3


def softmax(scores):
    """Causal softmax of "… query key"."""
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf).softmax(-1)


def random_pattern(batch, head, n, seed=0, spread=2.0):
    return softmax(spread * torch.randn(batch, head, n, n, generator=torch.Generator().manual_seed(seed)).double())


def random_table(n_heads, seed=0, n_buckets=32):
    return torch.randn(n_buckets, n_heads, generator=torch.Generator().manual_seed(seed)).double()


def encoding_pattern(encoding, n):
    positions = torch.arange(n)
    return softmax(encoding.bias(positions, positions, torch.zeros((), dtype=torch.float64)))[None].detach()


def dims(n_heads, n):
    return {"d_model": 4 * n_heads, "n_heads": n_heads, "d_head": 4, "n_ctx": n}


CONTEXT = TemplateContext(random_table(N_HEADS))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("n", [1, 2, 20])
def test_every_template_is_a_causal_pattern(name, n):
    pattern = random_pattern(2, N_HEADS, n)
    before = pattern.clone()
    template = TEMPLATES[name](pattern, torch.tensor([n, max(1, n - 3)]), CONTEXT)
    assert isinstance(template, FittedTemplate)
    assert template.pattern.shape == (N_HEADS, n, n) and template.pattern.dtype == torch.float64
    check_pattern(template.pattern[None], tolerance=1e-12)
    assert all(len(values) == N_HEADS and values.isfinite().all() for values in template.parameters.values())
    assert torch.equal(pattern, before)


@pytest.mark.parametrize(
    "name, rows",
    [
        ("uniform", [[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]]),
        ("previous_token", [[1, 0, 0], [1, 0, 0], [0, 1, 0]]),
        ("diagonal", [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ("first_token", [[1, 0, 0], [1, 0, 0], [1, 0, 0]]),
    ],
)
def test_literal_templates(name, rows):
    template = TEMPLATES[name](random_pattern(1, 2, 3))
    torch.testing.assert_close(template.pattern, torch.tensor([rows, rows], dtype=torch.float64))
    assert template.n_parameters == 0 and template.parameters == {}


@pytest.mark.parametrize("n_heads", [8, 12])
def test_alibi_is_that_of_bloom(n_heads):
    n = 30
    bias = build_alibi_tensor(torch.ones(1, n), n_heads, torch.float32).view(n_heads, 1, n)
    want = softmax(bias.double().expand(-1, n, -1))
    template = TEMPLATES["alibi"](random_pattern(1, n_heads, n))
    torch.testing.assert_close(template.pattern, want, atol=1e-6, rtol=0)
    assert list(template.parameters) == ["slope"] and template.n_parameters == 0
    torch.testing.assert_close(template.parameters["slope"], bias[:, 0, 1].double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("n_heads", [8, 12])
def test_slopes_of_bloom_are_recovered(n_heads):
    n = 40
    bias = build_alibi_tensor(torch.ones(1, n), n_heads, torch.float32).view(n_heads, 1, n)
    fitted = TEMPLATES["alibi_fitted"](softmax(bias.double().expand(-1, n, -1))[None])
    torch.testing.assert_close(fitted.parameters["slope"], bias[:, 0, 1].double(), atol=1e-6, rtol=0)
    assert fitted.n_parameters == 1


def test_alibi_of_the_encoding_is_recovered():
    pattern = encoding_pattern(Alibi(**dims(6, 50)), 50)
    for name in ("alibi", "alibi_fitted"):
        torch.testing.assert_close(TEMPLATES[name](pattern).pattern, pattern[0], atol=1e-8, rtol=0)


@pytest.mark.parametrize("slope", [-0.3, -0.01, 0.0, 3.0])
def test_slopes_of_any_sign_are_recovered(slope):
    pattern = pattern_from_bias(-slope * torch.arange(25.0, dtype=torch.float64)[None])[None]
    assert float(TEMPLATES["alibi_fitted"](pattern).parameters["slope"]) == pytest.approx(slope, abs=1e-6)


def hugging_face_t5(table, n, max_distance=128):
    positions = torch.arange(n)
    buckets = T5Attention._relative_position_bucket(
        positions[None] - positions[:, None], bidirectional=False, num_buckets=len(table), max_distance=max_distance
    )
    return softmax(table[buckets].permute(2, 0, 1))


@pytest.mark.parametrize("n_buckets, max_distance", [(32, 128), (16, 40)])
def test_t5_is_that_of_hugging_face(n_buckets, max_distance):
    table = random_table(N_HEADS, 1, n_buckets)
    template = TEMPLATES["t5"](random_pattern(1, N_HEADS, 150), None, TemplateContext(table.float(), max_distance))
    want = hugging_face_t5(table, 150, max_distance)
    torch.testing.assert_close(template.pattern, want, atol=1e-6, rtol=0)
    assert template.n_parameters == 0 and list(template.parameters) == ["bucket_bias"]
    assert torch.equal(template.parameters["bucket_bias"], table.float().double().T)


def test_t5_has_hugging_faces_distance_where_none_is_named():
    # Over the buckets' edges: a last bucket from 129 on would begin one token later.
    table = random_table(N_HEADS, 1)
    template = TEMPLATES["t5"](random_pattern(1, N_HEADS, 150), None, TemplateContext(table))
    torch.testing.assert_close(template.pattern, hugging_face_t5(table, 150), atol=1e-6, rtol=0)


@pytest.mark.parametrize("n, reach", [(10, 10), (17, 17), (60, 27), (140, 32)])
def test_biases_of_hugging_face_are_recovered(n, reach):
    table = random_table(N_HEADS, 2)
    pattern = hugging_face_t5(table, n)[None]
    fitted = TEMPLATES["t5_fitted"](pattern)
    torch.testing.assert_close(fitted.pattern, pattern[0], atol=1e-6, rtol=0)
    seen = table[:reach] - table[:reach].mean(0)
    torch.testing.assert_close(fitted.parameters["bucket_bias"][:, :reach], seen.T, atol=1e-4, rtol=0)
    assert (fitted.parameters["bucket_bias"][:, reach:] == 0).all()
    assert fitted.n_parameters == reach - 1


def test_t5_of_the_encoding_is_recovered():
    encoding = T5(**dims(N_HEADS, 40))
    torch.nn.init.normal_(encoding.weight, generator=torch.Generator().manual_seed(3))
    pattern = encoding_pattern(encoding.double(), 40)
    for name in ("t5", "t5_fitted"):
        template = TEMPLATES[name](pattern, None, TemplateContext(encoding.weight))
        assert not template.pattern.requires_grad
        torch.testing.assert_close(template.pattern, pattern[0], atol=1e-6, rtol=0)


def test_t5_wants_a_table_that_fits():
    pattern = random_pattern(1, N_HEADS, 4)
    with pytest.raises(ProbeError, match=r"wants a trained T5 table \(t5_table"):
        TEMPLATES["t5"](pattern)
    with pytest.raises(ProbeError, match=r"n_buckets × 3 heads, got \(32, 2\)"):
        TEMPLATES["t5"](pattern, None, TemplateContext(torch.zeros(32, 2)))
    with pytest.raises(ProbeError, match="with NaN or infinity"):
        TEMPLATES["t5"](pattern, None, TemplateContext(torch.eye(32, 3).index_fill(0, torch.tensor(31), math.nan)))
    assert "t5" not in available_templates(TemplateContext())
    assert available_templates(CONTEXT) == list(TEMPLATES)


FEATURES = {
    "alibi_fitted": lambda d: [-d],
    "power_law": lambda d: [-math.log(1 + d)],
    "previous_token_leaky": lambda d: [float(d == 1)],
    "diagonal_leaky": lambda d: [float(d == 0)],
    "rotary_fitted": lambda d: [math.cos(d * 10000 ** (-k / 16)) for k in range(16)],
    "t5_fitted": lambda d: [
        float(T5Attention._relative_position_bucket(torch.tensor(-d), False) == u) for u in range(32)
    ],
}


def stated_objective(theta, pattern, lengths, name):
    """Mean over the valid rows of KL(observed ‖ template), and the ridge, row by row and key by key; one head."""
    phi = torch.tensor([FEATURES[name](d) for d in range(pattern.shape[-1])], dtype=torch.float64)
    total, n_rows = 0.0, 0
    for sequence, length in zip(pattern, lengths.tolist(), strict=True):
        for t in range(length):
            bias = phi[[t - i for i in range(t + 1)]] @ theta
            log_q = bias - bias.logsumexp(0)
            total = (
                total + (torch.xlogy(sequence[t, : t + 1], sequence[t, : t + 1]) - sequence[t, : t + 1] * log_q).sum()
            )
            n_rows += 1
    return total / n_rows + RIDGE / 2 * theta.square().sum()


@pytest.mark.parametrize(
    "name, parameter",
    [
        ("alibi_fitted", "slope"),
        ("power_law", "exponent"),
        ("previous_token_leaky", "log_odds"),
        ("diagonal_leaky", "log_odds"),
        ("rotary_fitted", "coefficients"),
        ("t5_fitted", "bucket_bias"),
    ],
)
def test_the_fit_minimises_the_stated_objective(name, parameter):
    pattern, lengths = random_pattern(2, 2, 20, seed=4), torch.tensor([20, 11])
    fitted = TEMPLATES[name](pattern, lengths).parameters[parameter]
    for head in range(2):
        objective = lambda theta, p=pattern[:, head]: stated_objective(theta, p, lengths, name)  # noqa: E731

        def with_gradient(theta, objective=objective):
            theta = torch.tensor(theta, requires_grad=True)
            value = objective(theta)
            value.backward()
            return value.item(), theta.grad.numpy()

        theta = np.atleast_1d(fitted[head].numpy())
        value, gradient = with_gradient(theta)
        assert np.abs(gradient).max() < 1e-9
        oracle = scipy.optimize.minimize(with_gradient, np.zeros_like(theta), jac=True, method="L-BFGS-B", tol=1e-14)
        assert value <= oracle.fun + 1e-12
        assert oracle.fun == pytest.approx(value, abs=1e-7)
        if name != "rotary_fitted":  # whose long waves cannot be told apart
            np.testing.assert_allclose(oracle.x - oracle.x.mean(), theta - theta.mean(), atol=2e-3)


def test_fitted_moments_are_the_observed_ones():
    pattern, lengths = random_pattern(3, 2, 18, seed=5), torch.tensor([18, 4, 9])
    fitted = TEMPLATES["alibi_fitted"](pattern, lengths)
    distance = torch.arange(18)[:, None] - torch.arange(18)
    observed = sum((pattern[b, :, :length] * distance[:length]).sum((-1, -2)) for b, length in enumerate([18, 4, 9]))
    expected = sum((fitted.pattern[:, :length] * distance[:length]).sum((-1, -2)) for length in [18, 4, 9])
    torch.testing.assert_close(observed / 31, expected / 31, atol=1e-7, rtol=0)


@pytest.mark.parametrize("target, sign", [("diagonal", 1), ("first_token", -1)])
def test_saturated_heads_have_finite_slopes(target, sign):
    want = TEMPLATES[target](random_pattern(1, 1, 64)).pattern
    fitted = TEMPLATES["alibi_fitted"](want[None])
    assert 15 < sign * float(fitted.parameters["slope"]) < 22
    torch.testing.assert_close(fitted.pattern, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("target", ["diagonal", "previous_token"])
def test_buckets_without_attention_have_finite_biases(target):
    want = TEMPLATES[target](random_pattern(1, 1, 64)).pattern
    fitted = TEMPLATES["t5_fitted"](want[None])
    assert fitted.parameters["bucket_bias"].isfinite().all()
    assert float(fitted.parameters["bucket_bias"].sum()) == pytest.approx(0, abs=1e-3)
    torch.testing.assert_close(fitted.pattern, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["alibi_fitted", "t5_fitted"])
def test_padding_does_not_change_the_fit(name):
    pattern, lengths = random_pattern(2, 2, 12, seed=6), torch.tensor([7, 5])
    want = TEMPLATES[name](pattern, lengths)
    garbage = pattern.clone()
    garbage[0, :, 7:], garbage[1, :, 5:] = math.nan, 9.0
    assert torch.equal(TEMPLATES[name](garbage, lengths).pattern, want.pattern)
    # Within the longest sequence the fit is that of the patterns cut to it.
    cut = TEMPLATES[name](pattern[..., :7, :7], lengths)
    torch.testing.assert_close(want.pattern[:, :7, :7], cut.pattern, atol=1e-6, rtol=0)
    assert not torch.allclose(TEMPLATES[name](pattern).pattern, want.pattern, atol=1e-4)


def test_float32_patterns_give_the_same_fit():
    pattern = random_pattern(2, 2, 30, seed=7)
    for name in ("alibi_fitted", "t5_fitted"):
        single, double = TEMPLATES[name](pattern.float()), TEMPLATES[name](pattern)
        torch.testing.assert_close(single.pattern, double.pattern, atol=1e-6, rtol=0)
        for parameter, values in double.parameters.items():
            torch.testing.assert_close(single.parameters[parameter], values, atol=1e-4, rtol=0)


def test_by_distance_of_a_literal_and_its_inverse():
    rows = torch.tensor([[1.0, 0, 0], [2, 3, 0], [4, 5, 6]])
    assert by_distance(rows).tolist() == [[1, 0, 0], [3, 2, 0], [6, 5, 4]]
    pattern = random_pattern(2, 2, 9)
    assert torch.equal(by_distance(by_distance(pattern)), pattern)


def test_distance_mass_of_a_literal():
    pattern = torch.tensor([[[[1.0, 0], [0.25, 0.75]]], [[[1.0, 0], [math.nan, 7]]]])
    observed = DistanceMass.of(pattern, torch.tensor([2, 1]))
    torch.testing.assert_close(observed.mass, torch.tensor([[2.75 / 3, 0.25 / 3]], dtype=torch.float64))
    torch.testing.assert_close(observed.rows, torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64))
    torch.testing.assert_close(observed.first, torch.tensor([[2 / 3, 0.25 / 3]], dtype=torch.float64))


@pytest.mark.parametrize("n", [300, 2000, 5000])
def test_a_saturated_head_does_not_disturb_the_others(n):
    """All attention on the furthest key: the variance of the distance is 0, but the rounding of its parts is not."""
    rows = torch.full((n,), 1 / n, dtype=torch.float64)
    distance = torch.arange(n, dtype=torch.float64)
    geometric = (-distance / 4).exp()
    alibi = geometric * (rows / geometric.cumsum(0)).flip(0).cumsum(0).flip(0)
    mass = torch.stack([rows, alibi])
    slopes = -fit(DistanceMass.by_row(mass, rows, torch.zeros_like(mass)), distance[:, None])[:, 0]
    assert -22 < slopes[0] < -7
    assert float(slopes[1]) == pytest.approx(1 / 4, abs=1e-6)


def test_the_fit_holds_at_length_and_for_any_sharpness():
    """One head on <bos>, one on itself, one diffuse, together: the hardest case for the step length."""
    n = 512
    zero = torch.zeros(1, 1, n, n)
    heads = [TEMPLATES[name](zero).pattern for name in ("first_token", "diagonal", "uniform", "previous_token")]
    observed = DistanceMass.of(torch.cat(heads)[None])
    slopes = -fit(observed, torch.arange(n, dtype=torch.float64)[:, None])[:, 0]
    # Previous token: row t = 0 has distance 0 and the others 1, so 1/(e^m - 1) = 1 - 1/n but for the short rows.
    assert slopes[0] < -14 and slopes[1] > 15
    assert slopes[2:].tolist() == pytest.approx([0, math.log(2)], abs=0.01)
