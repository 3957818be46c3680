"""Closed form, chords, rounding units, Newton's division and the odometer: positions, up to their last digit."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from constructions import CONSTRUCTIONS, Chords, ClosedForm, ExactPosition, Newton, Odometer
from constructions.chords import ROUNDING, chord_knots, n_bits
from constructions.layout import POSITION
from constructions.observing import observe
from constructions.weights import perturbed
from probe.errors import ProbeError

SMALL = Odometer("small", levels=[(8, 3), (2, 3)])  # a span of 33


def test_the_closed_form_is_an_identity_of_rationals():
    length = 40
    for t in range(1, length + 1):
        assert 1 + 2 * sum(max(1 - Fraction(k, t), 0) for k in range(1, length)) == t
    parameters = dict(ClosedForm().build(length).named_parameters())
    assert parameters["layers.0.mlp.down_proj.weight"][POSITION].unique().tolist() == [2.0]
    assert sorted((-parameters["layers.0.mlp.up_proj.weight"][:, 3]).tolist()) == list(range(1, length))


def test_chords_lie_above_by_at_most_a_half():
    """In rationals of the knots' floats: at every t the chord through the knots about it, t + 0…1/2."""
    knots = chord_knots(3000)
    assert knots[0] == 1 and knots[-1] >= 3000 and len(knots) - 1 == math.ceil((math.sqrt(3000) - 1) * math.sqrt(2))
    for t in range(1, 3001):
        j = min(int(torch.searchsorted(knots, t, right=True)), len(knots) - 1)
        a, b = knots[j - 1].item(), knots[j].item()
        assert -1e-9 <= a + b - a * b / t - t <= 0.5 + 1e-9
    assert len(chord_knots(131072)) - 1 == 511


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_adding_the_constant_rounds_to_integers(dtype):
    M = torch.tensor(ROUNDING[dtype], dtype=dtype)
    low = -20.25 if dtype != torch.bfloat16 else 0.25
    y = torch.arange(low, 60, 0.125, dtype=torch.float64)
    y = y[(y % 1 != 0.5)].to(dtype)
    rounded = ((y + M) - M).double()
    assert rounded.equal(y.double().round())


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 1000])
def test_bits_are_those_of_integer_arithmetic(length):
    construction = ExactPosition()
    layout = construction.layout(length)
    site = "blocks.1.hook_resid_post"
    stream = observe(construction.build(length, torch.float32), construction.tokens(length), (site,))[site][0]
    for t in range(1, length + 1):
        bits = stream[t - 1, list(layout["bits"])].long().tolist()
        assert sum(bit << j for j, bit in enumerate(bits)) == t and stream[t - 1, POSITION] == t
        assert len(bits) == n_bits(length) and set(bits) <= {0, 1}


def test_newtons_steps_square_the_error():
    length = 500
    for steps in (1, 2, 3):
        construction = Newton(steps)
        sites = [f"blocks.{layer}.hook_resid_post" for layer in range(construction.layers)]
        seen = observe(construction.build(length), construction.tokens(length), sites)
        t = torch.arange(1, length + 1)
        error = [1 - seen[site][0, :, POSITION] / t for site in sites]
        assert error[0].abs().max() <= 1 / 17 + 1e-3
        for before, after in itertools.pairwise(error):
            torch.testing.assert_close(after, before**2, rtol=0, atol=1e-11)
    with pytest.raises(ProbeError, match=r"steps must be at least 1, got 0"):
        Newton(0)


@pytest.mark.parametrize("construction", [ClosedForm(), Newton()], ids=lambda each: each.name)
def test_one_percent_of_any_weight_is_too_much(construction, needed, nonzero):
    length = 24
    weights = nonzero(construction, length, construction.layout(length).content)
    missing = set(weights) - set(needed(construction, length, weights, (1.01, 0.99)))
    if construction.name == "newton":
        # A gate whose silu is 0 or saturated is not moved by 1 % (S is 2048); nor is what y and e have in common, the
        # place of a chord's knot, which the steps correct. Those weights must not be missing, though.
        missing -= set(needed(construction, length, missing, (0.0,)))
        missing -= set(needed(construction, length, missing, (-1.0,)))
        # The second unit of the last product, silu(-y) e, is within the tolerance by then.
        missing -= {("layers.3.mlp.down_proj.weight", (2, 1)), ("layers.3.mlp.up_proj.weight", (1, 4))}
    # <bos> alone can do without row ONE: every hinge is closed there with it or without.
    assert missing <= {("token_embedding.weight", (0, 0))}


def test_the_rounding_units_forgive_one_percent_but_no_weight_may_be_missing(needed, nonzero):
    """What is rounded is robust by design: an error below half a unit leaves no trace. So the weights are taken away,
    or their sign is turned; every one of a decoder as long as a power of two less one, which uses all bits and
    chords."""
    construction, length = ExactPosition(), 63
    weights = nonzero(construction, length, construction.layout(length).content)
    missing = set(weights) - set(needed(construction, length, weights, (0.0,)))
    missing -= set(needed(construction, length, missing, (-1.0,)))
    # <bos> can do without row ONE, and high bits without the share of the outermost chords, which is below half a unit.
    assert {name for name, _ in missing} <= {"token_embedding.weight", "layers.0.mlp.down_proj.weight"}
    assert len(missing) <= 8 and len(weights) > 100
    # One per cent is too much for what is written behind the rounding.
    exact = [w for w in weights if w[0].startswith("layers.1.mlp.down_proj")]
    assert len(needed(construction, length, exact, (1.01, 0.99))) == len(exact)


def test_no_weight_of_the_odometer_may_be_missing(needed, nonzero):
    """It compares by signs, so that one per cent does nothing in most of its weights. This one is small enough to turn
    every weight, at its whole span."""
    weights = nonzero(SMALL, SMALL.span, SMALL.layout(1).content)
    assert SMALL.check(SMALL.span, torch.bfloat16).holds.all() and SMALL.span == 33
    missing = set(weights) - set(needed(SMALL, SMALL.span, weights, (0.0,)))
    missing -= set(needed(SMALL, SMALL.span, missing, (-1.0,)))
    assert missing == {("token_embedding.weight", (0, 0))}  # row ONE of <bos>, which no digit needs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_an_odometer_ends_at_its_span(dtype):
    longer = SMALL.build_unclaimed(SMALL.span + 1, dtype)
    t, errors = SMALL.errors(longer, SMALL.tokens(SMALL.span + 1), "explicit")
    assert (errors["digits"][:-1] == 0).all() and errors["digits"][-1] > 0 and t[-1] == 34


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["explicit", "fused"])
def test_bfloat16_is_exact_at_8193_with_two_attention_layers(attention):
    rows = CONSTRUCTIONS["odometer_two"].check(8193, torch.bfloat16, attention=attention)
    assert (rows.largest_error == 0).all() and (rows.attention_layers == 2).all()
    assert (rows.positions_checked == 8193).all()


@pytest.mark.slow
def test_float32_is_exact_at_32768_positions_and_all_bits():
    """131,072 takes half a minute; its row is in limits.csv."""
    rows = ExactPosition().check(32768, torch.float32, attention="fused")
    assert (rows.largest_error == 0).all() and (rows.positions_checked == 32768).all()
    assert (rows.attention_layers.iloc[0], rows.mlp_layers.iloc[0]) == (1, 2) and rows.width.max() <= 600


@pytest.mark.slow
def test_the_closed_form_in_float64_goes_to_16384():
    assert ClosedForm().check(16384, torch.float64, attention="fused").holds.all()


def test_a_wrong_chord_is_found_at_its_place():
    construction = Chords()
    decoder = perturbed(construction.build(500), "layers.0.mlp.down_proj.weight", (POSITION, 20), 1.2)
    rows = construction.check(500, decoder=decoder).set_index("quantity")
    assert rows.first_failure["position"] > chord_knots(500)[20]
