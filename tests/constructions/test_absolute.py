from fractions import Fraction

import pytest
import torch

from constructions import AbsolutePosition, perturbed
from constructions.layout import CONTENT, IS_BOS, ONE, POSITION
from constructions.observing import observe
from probe.errors import ProbeError

CONSTRUCTION = AbsolutePosition()
DTYPES = [torch.float64, torch.float32]
LENGTHS = [1, 2, 3, 64, 1024]

VALUE, OUTPUT = "layers.0.attention.v_proj.weight", "layers.0.attention.o_proj.weight"
HINGE_IN, HINGE_AT = "layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.bias"
HINGE_OUT, START = "layers.0.mlp.down_proj.weight", "layers.0.mlp.down_proj.bias"
EMBEDDING = "token_embedding.weight"


def essential_weights(length: int) -> list[tuple[str, tuple[int, ...]]]:
    """Every non-zero weight that the claim rests on: all but the content, and row ONE, which no head reads here."""
    decoder = CONSTRUCTION.build(length)
    weights = [(name, tuple(i)) for name, p in decoder.named_parameters() for i in p.nonzero().tolist()]
    return [(name, i) for name, i in weights if name != EMBEDDING or i[1] == IS_BOS]


def position_after(tokens: torch.Tensor, length: int, site: str = "blocks.0.hook_resid_post") -> torch.Tensor:
    return observe(CONSTRUCTION.build(length), tokens, (site,))[site][0, :, POSITION]


@pytest.mark.parametrize("attention", ["explicit", "fused", "auto"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_claim_holds(dtype, length, attention):
    rows = CONSTRUCTION.check(length, dtype, attention=attention)
    assert rows.quantity.tolist() == ["position", "content"]
    assert rows.holds.all(), rows[["quantity", "largest_error"]]


@pytest.mark.parametrize("attention", ["explicit", "fused"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_claim_holds_up_to_the_claimed_length(dtype, attention):
    assert CONSTRUCTION.check(CONSTRUCTION.max_length[dtype], dtype, attention=attention).holds.all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_recovers_the_integers(dtype):
    length = CONSTRUCTION.max_length[dtype]
    seen = observe(CONSTRUCTION.build(length, dtype), CONSTRUCTION.tokens(length), ("blocks.0.hook_resid_post",))
    assert seen["blocks.0.hook_resid_post"][0, :, POSITION].round().tolist() == list(range(1, length + 1))


def test_a_decoder_for_longer_sequences_serves_shorter_ones():
    assert CONSTRUCTION.check(40, decoder=CONSTRUCTION.build(64)).holds.all()
    # ... but not longer ones: beyond its last knot the interpolation goes on in a straight line.
    rows = CONSTRUCTION.check(65, decoder=CONSTRUCTION.build(64)).set_index("quantity")
    assert not rows.holds["position"] and rows.holds["content"]


def test_the_hinges_interpolate_exactly():
    """The proof in rational numbers: knots and turns of the built weights give f(1/t) - 1/t = t - 1/t, no rounding."""
    length = 50
    parameters = dict(CONSTRUCTION.build(length).named_parameters())
    knots = [Fraction(-b).limit_denominator(length) for b in parameters[HINGE_AT].tolist()]
    turns = [Fraction(w) for w in parameters[HINGE_OUT][POSITION].tolist()]
    assert sorted(knots) == [0, *(Fraction(1, k) for k in range(length, 1, -1))]
    slopes = {}
    for k in range(1, length):
        inside = (Fraction(1, k) + Fraction(1, k + 1)) / 2
        slopes[k] = sum(w for w, knot in zip(turns, knots, strict=True) if inside > knot) + 1  # + 1: without the -x
    assert slopes == {k: -k * (k + 1) for k in range(1, length)}
    for t in range(1, length + 1):
        x = Fraction(1, t)
        hidden = [max(x - knot, 0) for knot in knots]
        written = Fraction(parameters[START][POSITION].item()) + sum(w * h for w, h in zip(turns, hidden, strict=True))
        assert x + written == t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_writes_the_reciprocal(dtype):
    length = 1024
    seen = observe(
        CONSTRUCTION.build(length, dtype),
        CONSTRUCTION.tokens(length),
        ("blocks.0.attn.hook_pattern", "blocks.0.hook_resid_mid"),
    )
    wanted = 1 / torch.arange(1, length + 1, dtype=torch.float64)
    torch.testing.assert_close(
        seen["blocks.0.hook_resid_mid"][0, :, POSITION], wanted, rtol=torch.finfo(dtype).eps, atol=0
    )
    uniform = wanted[:, None].expand(length, length).tril()
    torch.testing.assert_close(seen["blocks.0.attn.hook_pattern"][0, 0], uniform, rtol=torch.finfo(dtype).eps, atol=0)


def test_content_is_random_and_an_edit_of_it_is_noticed():
    decoder = CONSTRUCTION.build(16)
    content = decoder.token_embedding.weight[:, CONTENT]
    assert content.abs().min() > 0 and torch.linalg.matrix_rank(content) == content.shape[1]
    assert decoder.token_embedding.weight[:, ONE].unique().tolist() == [1]
    with torch.no_grad():
        decoder.layers[0].mlp.down_proj.bias[POSITION + 1] = 1e-12
    rows = CONSTRUCTION.check(16, decoder=decoder).set_index("quantity")
    assert rows.holds["position"] and not rows.holds["content"]


@pytest.mark.parametrize(("weight", "index"), essential_weights(16), ids=lambda part: str(part))
def test_every_essential_weight_is_needed(weight, index):
    decoder = CONSTRUCTION.build(16)
    for factor in (0.99, 1.01):
        assert not CONSTRUCTION.check(16, decoder=perturbed(decoder, weight, index, factor)).holds.all()


COARSE = [  # 1 % of these moves a position by .5 or more at length 1024
    (VALUE, (0, IS_BOS)),
    (OUTPUT, (POSITION, 0)),
    (EMBEDDING, (0, IS_BOS)),
    (START, (POSITION,)),
    (HINGE_IN, (1023, POSITION)),
    (HINGE_AT, (1023,)),
    (HINGE_OUT, (POSITION, 1023)),
    (HINGE_IN, (500, POSITION)),
    (HINGE_OUT, (POSITION, 500)),
]
FINE = [  # ... and of these by .02: float32's own error is half of that there, and its tolerance ten times
    (HINGE_AT, (1,)),
    (HINGE_AT, (500,)),
    (HINGE_IN, (0, POSITION)),
    (HINGE_OUT, (POSITION, 0)),
    (HINGE_IN, (1, POSITION)),
    (HINGE_OUT, (POSITION, 1)),
]


@pytest.mark.parametrize(
    ("weight", "index", "dtype"),
    [(*each, dtype) for dtype in DTYPES for each in COARSE] + [(*each, torch.float64) for each in FINE],
    ids=lambda part: str(part),
)
def test_the_weights_are_needed_at_length_1024(weight, index, dtype):
    decoder = perturbed(CONSTRUCTION.build(1024, dtype), weight, index)
    assert not CONSTRUCTION.check(1024, dtype, decoder=decoder).holds.all()


def with_bos(length: int, *at: int) -> torch.Tensor:
    tokens = CONSTRUCTION.tokens(length)
    tokens[:, 0] = 7
    tokens[:, list(at)] = 0
    return tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [(0, 20), (), (9,), (0, 1)], ids=["doubled", "dropped", "moved", "twice at first"])
def test_the_claim_wants_one_bos_at_the_first_place(at, dtype):
    tokens = with_bos(64, *at)
    rows = CONSTRUCTION.check(64, dtype, tokens=tokens).set_index("quantity")
    assert not rows.holds["position"] and rows.holds["content"]


@pytest.mark.parametrize("at", [(0,), (0, 20), (), (9,), (0, 1), (3, 4, 60)], ids=str)
def test_the_head_counts_bos_over_t(at):
    """Row POSITION holds #<bos>/t after attention, and the MLP maps each 1/k to k, and 0 to T."""
    length = 64
    tokens = with_bos(length, *at)
    counts = [sum(place <= p for place in at) for p in range(length)]
    shares = [Fraction(n, p + 1) for p, n in enumerate(counts)]
    seen = position_after(tokens, length, "blocks.0.hook_resid_mid")
    torch.testing.assert_close(seen, torch.tensor([float(x) for x in shares], dtype=torch.float64))
    after = position_after(tokens, length).tolist()
    for x, y in zip(shares, after, strict=True):
        if x == 0 or x.numerator == 1:
            assert y == pytest.approx(length if x == 0 else x.denominator, abs=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_beyond_the_claim_are_refused(dtype):
    longest, short = CONSTRUCTION.max_length[dtype], str(dtype).removeprefix("torch.")
    for call in (CONSTRUCTION.build, CONSTRUCTION.check):
        for length in (longest + 1, 0):
            with pytest.raises(ProbeError, match=rf"lengths 1…{longest} in {short}, got {length}$"):
                call(length, dtype)


def test_other_wrong_inputs_are_refused():
    with pytest.raises(ProbeError, match=r"absolute_position is made for float64, float32; got bfloat16$"):
        CONSTRUCTION.build(8, torch.bfloat16)
    with pytest.raises(ProbeError, match=r"wants a decoder in float32, got one in float64$"):
        CONSTRUCTION.check(8, torch.float32, decoder=CONSTRUCTION.build(8))
    with pytest.raises(ProbeError, match=r"wants sequences of 8 tokens, got 9$"):
        CONSTRUCTION.check(8, tokens=CONSTRUCTION.tokens(9))


def test_float16_cannot_hold_the_weights_beyond_256():
    """Why it is not claimed there: the weight (T - 1) T passes the largest float16, 65504, after T = 256."""
    assert CONSTRUCTION.build(256).to(torch.float16).layers[0].mlp.down_proj.weight.isfinite().all()
    assert not CONSTRUCTION.build(257).to(torch.float16).layers[0].mlp.down_proj.weight.isfinite().all()


def test_a_broken_decoder_never_holds():
    decoder = CONSTRUCTION.build(8)
    with torch.no_grad():
        decoder.layers[0].mlp.down_proj.bias.fill_(torch.nan)
    assert not CONSTRUCTION.check(8, decoder=decoder).holds.any()
