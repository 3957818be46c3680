import math

import pytest
import torch

from constructions import CONSTRUCTIONS, perturbed
from constructions.counting import CURVATURE, counting_score
from constructions.layout import BOS, POSITION
from probe.tracing import trace

HEAD = CONSTRUCTIONS["counting_head"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("length", "attention"), [(2, "explicit"), (64, "explicit"), (1024, "fused"), (4096, "fused"), (16384, "fused")]
)
def test_it_counts(length, attention, dtype):
    if length > HEAD.max_length[dtype]:
        pytest.skip("how far float32 goes beyond is the processor's")
    assert HEAD.check(length, dtype, attention=attention)["holds"].all()


def test_rounded_to_the_nearest_integer_it_is_exact():
    decoder = HEAD.build(4096, torch.float32)
    hooks, seen = {"blocks.0.hook_resid_post": lambda v: seen.append(v)}, []
    decoder(HEAD.tokens(4096), hooks=hooks, attention="fused")
    assert seen[0][0, :, POSITION].round().tolist() == list(range(1, 4097))


def test_the_pattern_is_the_softmax_of_one_score():
    length = 40
    c = counting_score(length)
    pattern = trace(HEAD.build(length), HEAD.tokens(length), ["blocks.0.attn.hook_pattern"]).pattern(0)[0, 0]
    for t in (1, 2, 40):
        scores = torch.zeros(t, dtype=torch.float64)
        scores[0] = c
        torch.testing.assert_close(pattern[t - 1, :t], scores.softmax(0))


def test_it_is_off_a_straight_line_by_no_more_than_it_says():
    for length in (10, 1000, 10**6):
        p, epsilon = length - 1, math.exp(-counting_score(length))
        assert 0.9 * CURVATURE * (p / length) ** 2 < p - p / (1 + p * epsilon) < CURVATURE


@pytest.mark.parametrize("factor", [0.99, 1.01])
@pytest.mark.parametrize(("weight", "index"), [
    ("layers.0.attention.q_proj.weight", (0, 0)),
    ("layers.0.attention.k_proj.weight", (0, 1)),
    ("layers.0.attention.v_proj.weight", (0, 3)),
    ("layers.0.attention.o_proj.weight", (POSITION, 0)),
])  # fmt: skip
def test_every_weight_counts(weight, index, factor):
    for dtype in (torch.float64, torch.float32):
        decoder = perturbed(HEAD.build(256, dtype), weight, index, factor)
        rows = HEAD.check(256, dtype, decoder=decoder)
        assert not rows[rows["quantity"] == "position"]["holds"].item()


def test_the_offset_counts_too():
    decoder = perturbed(HEAD.build(256), "layers.0.attention.o_proj.bias", (POSITION,), 1.1)
    assert not HEAD.check(256, decoder=decoder)["holds"].all()


@pytest.mark.parametrize("where", [[], [1], [0, 100]], ids=["dropped", "moved", "doubled"])
def test_bos_must_stand_first_and_alone(where):
    tokens = HEAD.tokens(256)
    tokens[0, 0] = 5
    tokens[0, where] = BOS
    rows = HEAD.check(256, tokens=tokens)
    assert not rows[rows["quantity"] == "position"]["holds"].item()
