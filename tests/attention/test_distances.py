import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from scipy.stats import wasserstein_distance

from probe.attention import DISTANCES, check_pattern, pattern_distance
from probe.attention import distances as module
from probe.errors import ProbeError
from probe.limits import limits

METRICS = {
    "total_variation": lambda d: d,
    "hellinger": lambda d: d,
    "wasserstein": lambda d: d,
    "jensen_shannon": torch.sqrt,
}
HIGHEST = {"jensen_shannon": math.log(2), "total_variation": 1.0, "hellinger": 1.0, "wasserstein": 5.0}

ORACLES = {
    "jensen_shannon": lambda p, q: jensenshannon(p, q) ** 2,
    "symmetric_kl": lambda p, q: rel_entr(p, q).sum() + rel_entr(q, p).sum(),
    "total_variation": lambda p, q: np.maximum(p - q, 0).sum(),
    "hellinger": lambda p, q: math.sqrt(max(0.0, 1 - np.sqrt(p * q).sum())),
    "wasserstein": lambda p, q: wasserstein_distance(range(len(p)), range(len(q)), p, q),
    "mcgill_compat": lambda p, q: (rel_entr((p + q) / 2, p).sum() + rel_entr((p + q) / 2, q).sum()) / 2,
}


def random_rows(n, keys, zeros, seed):
    """Rows that sum to 1; with ``zeros``, about a third of the entries are exactly 0."""
    rng = np.random.default_rng(seed)
    rows = rng.gamma(0.3, size=(n, keys)) + 1e-12
    if zeros:
        rows[:, 1:] *= rng.random((n, keys - 1)) > 0.33
    return torch.from_numpy(rows / rows.sum(1, keepdims=True))


def causal(batch, head, n, seed=0, dtype=torch.float64):
    scores = torch.randn(batch, head, n, n, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf).softmax(-1)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", DISTANCES)
def test_equals_scipy(name, zeros):
    p, q = random_rows(40, 7, zeros, 1), random_rows(40, 7, zeros, 2)
    got = DISTANCES[name](p, q)
    want = torch.tensor([ORACLES[name](a, b) for a, b in zip(p.numpy(), q.numpy(), strict=True)], dtype=torch.float64)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# P = (1, 0), Q = (0, 1), R = (1/2, 1/2), worked out by hand.
@pytest.mark.parametrize(
    "name, opposite, half",
    [
        ("jensen_shannon", math.log(2), 0.75 * math.log(4 / 3)),
        ("symmetric_kl", math.inf, math.inf),
        ("total_variation", 1.0, 0.5),
        ("hellinger", 1.0, math.sqrt(1 - math.sqrt(0.5))),
        ("wasserstein", 1.0, 0.5),
        ("mcgill_compat", math.inf, math.inf),
    ],
)
def test_literal_rows(name, opposite, half):
    p, q, r = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])
    got = torch.stack([DISTANCES[name](a, b) for a, b in [(p, q), (p, r), (r, p), (p, p), (q, q), (r, r)]])
    torch.testing.assert_close(got, torch.tensor([opposite, half, half, 0, 0, 0], dtype=torch.float64))


def test_jensen_shannon_of_finite_literals():
    # M = (1/2, 1/2): KL(P‖M) = KL(Q‖M) = ¾ ln(3/2) + ¼ ln(1/2).
    got = DISTANCES["jensen_shannon"](torch.tensor([0.75, 0.25]), torch.tensor([0.25, 0.75]))
    assert float(got) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-15)


def test_wasserstein_counts_tokens_and_not_what_a_sum_lacks():
    p, q = torch.eye(6)[0], torch.eye(6)
    assert DISTANCES["wasserstein"](p, q).tolist() == [0, 1, 2, 3, 4, 5]
    assert DISTANCES["wasserstein"](q[5], 0.5 * q[5]).item() == 0


@pytest.mark.parametrize("change", [1e-15, 1e-9])
def test_jensen_shannon_of_nearly_equal_rows_is_not_negative(change):
    p, noise = random_rows(500, 20, True, 9), random_rows(500, 20, False, 10) - 1 / 20
    q = p * (1 + change * noise)
    got = DISTANCES["jensen_shannon"](p, q / q.sum(-1, keepdim=True))
    assert (got >= 0).all() and (got < 1e-14).all()


@pytest.mark.parametrize("name", DISTANCES)
def test_tiny_weights_are_not_zero_weights(name):
    p = torch.tensor([1.0, 1e-20, 0.0], dtype=torch.float64)
    q = torch.tensor([1e-20, 1.0, 0.0], dtype=torch.float64)
    got = DISTANCES[name](p, q)
    want = {
        "jensen_shannon": math.log(2),
        "symmetric_kl": 40 * math.log(10),
        "total_variation": 1,
        "hellinger": 1 - 1e-10,
        "wasserstein": 1,
        "mcgill_compat": 10 * math.log(10) - math.log(2),
    }
    assert float(got) == pytest.approx(want[name], rel=1e-12)


def test_mcgill_is_what_torch_computes_with_the_arguments_swapped():
    p, q = random_rows(20, 6, False, 3), random_rows(20, 6, False, 4)
    kl, m = torch.nn.KLDivLoss(reduction="none"), (p + q) / 2
    swapped = (kl(p.log(), m) + kl(q.log(), m)).sum(-1) / 2
    torch.testing.assert_close(DISTANCES["mcgill_compat"](p, q), swapped)


def test_jensen_shannon_follows_from_the_two_published_numbers():
    p, q = random_rows(50, 9, False, 5), random_rows(50, 9, False, 6)
    got = DISTANCES["symmetric_kl"](p, q) / 4 - DISTANCES["mcgill_compat"](p, q)
    torch.testing.assert_close(got, DISTANCES["jensen_shannon"](p, q), rtol=1e-10, atol=1e-12)
    published_kl, published_jsd = 4.311374, 0.843930  # means over rows: the identity is linear, it holds for them too
    assert published_kl / 4 - published_jsd == pytest.approx(0.2339, abs=5e-5)


def test_released_distance_is_unbounded():
    p = torch.tensor([1 - 1e-12, 1e-12], dtype=torch.float64)
    assert float(DISTANCES["mcgill_compat"](p, p.flip(-1))) > 10


ROWS = hnp.arrays(np.float64, (3, 6), elements=st.sampled_from([0.0, 1e-9, 0.01, 0.3, 1.0, 7.0])).filter(
    lambda a: bool((a.sum(1) > 0).all())
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(ROWS)
@pytest.mark.parametrize("name", DISTANCES)
def test_axioms(name, rows):
    p, q, r = torch.from_numpy(rows / rows.sum(1, keepdims=True))
    d = DISTANCES[name]
    assert float(d(p, p)) == 0
    assert float(d(p, q)) == pytest.approx(float(d(q, p)), abs=1e-12)
    assert -1e-13 <= float(d(p, q)) <= HIGHEST.get(name, math.inf) * (1 + 1e-12)
    if not torch.equal(p, q) and (p - q).abs().max() > 1e-6:
        assert float(d(p, q)) > 0
    if name in METRICS:
        metric = lambda a, b: float(METRICS[name](d(a, b)))  # noqa: E731
        assert metric(p, r) <= metric(p, q) + metric(q, r) + 1e-7


@pytest.mark.parametrize("name", DISTANCES)
def test_rows_broadcast_and_inputs_stay(name):
    p, q = random_rows(4, 5, True, 7).float(), random_rows(3, 5, True, 8).float()
    before = p.clone(), q.clone()
    table = DISTANCES[name](p[:, None], q[None])
    assert table.shape == (4, 3)
    assert table[2, 1] == DISTANCES[name](p[2], q[1])
    assert not table.isnan().any()
    assert torch.equal(p, before[0]) and torch.equal(q, before[1])


def test_pattern_distance_of_literal_patterns():
    diagonal, first = torch.eye(3)[None, None], torch.eye(3)[[0, 0, 0]][None, None]
    # Rows: equal, one token apart, two tokens apart.
    assert pattern_distance(diagonal, first, "wasserstein").tolist() == [[1.0]]
    assert pattern_distance(diagonal, first, "total_variation").item() == pytest.approx(2 / 3)
    assert pattern_distance(diagonal, first, "jensen_shannon").item() == pytest.approx(2 / 3 * math.log(2))
    assert pattern_distance(diagonal, first).item() == pytest.approx(2 / 3 * math.log(2))


@pytest.mark.parametrize("block", [1, 40, 10**9])
@pytest.mark.parametrize("name", DISTANCES)
def test_pattern_distance_equals_a_loop_over_rows(name, block):
    p, q, lengths = causal(3, 2, 7, 1), causal(1, 2, 7, 2), torch.tensor([7, 1, 4])
    with limits(distance_block=block):
        got = pattern_distance(p, q, name, lengths)
    for b in range(3):
        for h in range(2):
            rows = [DISTANCES[name](p[b, h, t], q[0, h, t]) for t in range(int(lengths[b]))]
            assert float(got[b, h]) == pytest.approx(float(sum(rows)) / len(rows), rel=1e-12, abs=1e-14)


@pytest.fixture
def pieces(monkeypatch):
    """The shapes of the differences of rows, where that is the distance."""
    seen = []

    def distance(p, q):
        seen.append((p - q).shape)
        return (p - q).sum(-1)

    monkeypatch.setitem(DISTANCES, "seen", distance)
    return seen


def test_pattern_distance_takes_half_a_mebibyte_at_once_and_no_key_after_the_last_query(pieces):
    pattern_distance(causal(4, 2, 256), causal(1, 2, 256), "seen")
    assert pieces == [(4, 2, 32, keys) for keys in range(32, 257, 32)]
    assert math.prod(pieces[-1]) * torch.float64.itemsize == 2**19


def test_pattern_distance_of_the_least_pieces(pieces):
    with limits(distance_block=11):  # two rows of one pattern, one of three
        pattern_distance(causal(1, 1, 5), causal(1, 1, 5), "seen")
        pattern_distance(causal(1, 1, 3), causal(3, 1, 3), "seen")
    assert pieces == [(1, 1, 2, 2), (1, 1, 2, 4), (1, 1, 1, 5)] + [(3, 1, 1, keys) for keys in (1, 2, 3)]


def test_pattern_distance_ignores_the_padding():
    p, q, lengths = causal(3, 2, 6, 1), causal(3, 2, 6, 2), torch.tensor([6, 2, 5])
    want = pattern_distance(p, q, "jensen_shannon", lengths)
    garbage = p.clone()
    garbage[1, :, 2:], garbage[2, :, 5:] = math.nan, -3.0
    assert torch.equal(pattern_distance(garbage, q, "jensen_shannon", lengths), want)
    assert not torch.equal(pattern_distance(p, q, "jensen_shannon"), want)


def test_unknown_distance():
    with pytest.raises(ProbeError, match="unknown distance 'cosine'; known: hellinger, jensen_shannon"):
        pattern_distance(causal(1, 1, 3), causal(1, 1, 3), "cosine")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_check_accepts_what_a_softmax_makes(dtype):
    check_pattern(causal(2, 3, 40).to(dtype))
    check_pattern(causal(2, 3, 40), torch.tensor([1, 40]))


def spoiled(batch, head, row, key, value):
    pattern = causal(2, 3, 5, dtype=torch.float32)
    pattern[batch, head, row, key] = value
    return pattern


@pytest.mark.parametrize(
    "pattern, message",
    [
        (spoiled(1, 2, 3, 0, math.nan), r"weights >= 0, but batch 1, head 2, row 3 has nan"),
        (spoiled(0, 1, 4, 2, -0.25), r"weights >= 0, but batch 0, head 1, row 4 has -0.25"),
        (spoiled(1, 0, 2, 3, 0.125), r"no weight on keys after the query, but batch 1, head 0, row 2 has 0.125"),
        (spoiled(1, 0, 0, 0, 0.5), r"rows that sum to 1 \(within 3.5e-04\), but batch 1, head 0, row 0 sums to 0.5"),
        (spoiled(1, 0, 0, 0, math.inf), r"batch 1, head 0, row 0 sums to inf"),
        (causal(1, 1, 4)[0], r"\(batch, head, query, key\).*got torch.float64 \(1, 4, 4\)"),
        (causal(1, 1, 4)[:, :, :3], r"as many queries as keys, got torch.float64 \(1, 1, 3, 4\)"),
        (torch.ones(1, 1, 1, 1, dtype=torch.long), r"must hold floats .* got torch.int64"),
        (torch.zeros(0, 1, 3, 3), r"got torch.float32 \(0, 1, 3, 3\)"),
    ],
)
def test_check_refuses(pattern, message):
    with pytest.raises(ProbeError, match=message) as caught:
        check_pattern(pattern)
    assert "\n" not in str(caught.value)


def test_check_ignores_the_padding_and_honours_the_tolerance():
    pattern = spoiled(1, 2, 3, 0, math.nan)
    check_pattern(pattern, torch.tensor([5, 3]))
    with pytest.raises(ProbeError, match="row 3 has nan"):
        check_pattern(pattern, torch.tensor([5, 4]))
    short = causal(1, 1, 3) * 0.99
    with pytest.raises(ProbeError, match=r"row 0 sums to 0.99"):
        check_pattern(short)
    check_pattern(short, tolerance=0.02)
    check_pattern(torch.eye(3)[None, None], tolerance=0.0)


@pytest.mark.parametrize("lengths", [torch.tensor([5]), torch.tensor([0, 5]), torch.tensor([5, 6])])
def test_check_refuses_lengths_that_do_not_fit(lengths):
    with pytest.raises(ProbeError, match=r"lengths must be 2 numbers in 1…5, got \["):
        check_pattern(causal(2, 1, 5), lengths)


@pytest.mark.parametrize(("capability", "by_numpy"), [("AVX512", True), ("AVX2", False)])
def test_the_logarithm_is_exact_to_the_last_place(capability, by_numpy, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    calls, log = [], np.log
    monkeypatch.setattr(module.np, "log", lambda *args, **options: calls.append(1) or log(*args, **options))
    x = torch.cat([torch.logspace(-300, 0, 10_001, dtype=torch.float64), torch.rand(10_000, dtype=torch.float64)])
    exact = torch.tensor([math.log(value) for value in x.tolist()], dtype=torch.float64)
    out = torch.empty_like(x)
    assert module.ln(x, out=out) is out
    for found in (out, module.ln(x)):
        torch.testing.assert_close(found, exact, rtol=3e-16, atol=0)
    assert module.ln(torch.tensor([0.0, 1.0]).double()).tolist() == [-math.inf, 0.0]
    assert len(calls) == 3 * by_numpy


def test_gradients_pass_through_the_divergence():
    p, q = (torch.rand(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda p, q: DISTANCES["jensen_shannon"](p / p.sum(), q / q.sum()), (p, q))
