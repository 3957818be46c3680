import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from benchmarks.head_pairs import lean_loop, loop
from probe.attention import DISTANCES, head_pair_distances, pattern_distance
from probe.errors import ProbeError
from probe.limits import limits


def causal(batch, head, n, seed=0, zeros=False):
    """Random patterns; with ``zeros``, some weights are exactly 0 and others 1e-300, and one head is a diagonal."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(batch, head, n, n, generator=generator, dtype=torch.float64)
    pattern = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    if zeros:
        fate = torch.rand(pattern.shape, generator=generator)
        pattern = torch.where(fate < 0.2, 0.0, torch.where(fate < 0.3, pattern * 1e-300, pattern))
        pattern[..., torch.arange(n), torch.arange(n)] += 0.1
        pattern[:, 0] = torch.eye(n, dtype=torch.float64)
        pattern = pattern / pattern.sum(-1, keepdim=True)
    return pattern


def pair_by_pair(a, b, distance, lengths):
    found = torch.empty(len(a), a.shape[1], b.shape[1], dtype=torch.float64)
    for h, k in itertools.product(range(a.shape[1]), range(b.shape[1])):
        found[:, h, k] = pattern_distance(a[:, [h]], b[:, [k]], distance, lengths)[:, 0]
    return found


@pytest.mark.parametrize("block", [1, 50, 2**15])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", DISTANCES)
def test_equals_pattern_distance(name, zeros, block):
    a, b, lengths = causal(3, 4, 17, 1, zeros), causal(3, 2, 17, 2, zeros), torch.tensor([17, 1, 9])
    for of in (lengths, None):
        with limits(head_pair_block=block):
            got = head_pair_distances(a, b, name, of)
        torch.testing.assert_close(got, pair_by_pair(a, b, name, of), rtol=1e-12, atol=1e-12)
        assert not got.isnan().any()


@pytest.mark.parametrize("name", ["symmetric_kl", "mcgill_compat"])
def test_infinite_where_exactly_one_weight_is_0(name):
    a = torch.tensor([[[[1.0, 0], [0.5, 0.5]], [[1, 0], [1, 0]]]])
    got = head_pair_distances(a, a, name)
    assert got.isinf().tolist() == [[[False, True], [True, False]]]
    assert got[0].diagonal().tolist() == [0, 0]


@pytest.mark.parametrize("name", DISTANCES)
def test_equal_heads_are_at_0_and_near_ones_keep_their_digits(name):
    a = causal(2, 3, 30, 3)
    b = a.clone()
    b[:, 1] = (1 - 1e-6) * a[:, 1] + 1e-6 * causal(2, 1, 30, 4)[:, 0]
    got = head_pair_distances(a, b, name)
    assert (got[:, [0, 2], [0, 2]] == 0).all()
    want = pattern_distance(a[:, [1]], b[:, [1]], name)
    torch.testing.assert_close(got[:, 1, 1], want[:, 0], rtol=1e-12, atol=0)
    assert (got[:, 1, 1] > 0).all()


def test_float32_patterns_are_compared_in_float64():
    a, b = causal(1, 3, 20, 1).float(), causal(1, 3, 20, 2).float()
    for name in DISTANCES:
        got = head_pair_distances(a, b, name)
        torch.testing.assert_close(got, pair_by_pair(a.double(), b.double(), name, None), rtol=1e-12, atol=1e-12)


def test_padding_is_not_read():
    a, b, lengths = causal(2, 3, 8, 1), causal(2, 3, 8, 2), torch.tensor([8, 5])
    garbage = a.clone()
    garbage[1, :, 5:] = math.nan
    for name in DISTANCES:
        assert torch.equal(head_pair_distances(garbage, b, name, lengths), head_pair_distances(a, b, name, lengths))


def test_the_loops_of_the_benchmark_agree():
    a, b = causal(1, 3, 11, 1), causal(1, 3, 11, 2)
    kl, jsd = head_pair_distances(a, b, "symmetric_kl")[0], head_pair_distances(a, b, "jensen_shannon")[0]
    released = head_pair_distances(a, b, "mcgill_compat")[0]
    for found in (loop(a[0], b[0]), lean_loop(a[0], b[0])):
        torch.testing.assert_close(found, torch.stack([kl, released]))
        torch.testing.assert_close(found[0] / 4 - found[1], jsd)


ROWS = hnp.arrays(np.float64, (4, 5), elements=st.sampled_from([0.0, 1e-300, 1e-9, 0.01, 0.3, 1.0, 7.0])).filter(
    lambda a: bool((a.sum(1) > 0).all())
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ROWS)
@pytest.mark.parametrize("name", DISTANCES)
def test_axioms(name, rows):
    """Four heads whose last row is anything and whose others are all on the first key."""
    pattern = torch.eye(5, dtype=torch.float64)[0].repeat(1, 4, 5, 1)
    pattern[0, :, 4] = torch.from_numpy(rows / rows.sum(1, keepdims=True))
    got = head_pair_distances(pattern, pattern, name)[0]
    assert (got.diagonal() == 0).all() and (got >= 0).all()
    torch.testing.assert_close(got, got.T, rtol=1e-12, atol=1e-14)
    if name == "mcgill_compat":
        kl, jsd = (head_pair_distances(pattern, pattern, of)[0] for of in ("symmetric_kl", "jensen_shannon"))
        torch.testing.assert_close(got, kl / 4 - jsd, rtol=1e-12, atol=1e-13)
        assert (jsd <= math.log(2) + 1e-15).all()


def test_head_pairs_refuses():
    with pytest.raises(ProbeError, match="unknown distance 'l2'"):
        head_pair_distances(causal(1, 2, 4), causal(1, 2, 4), "l2")
