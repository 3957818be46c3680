"""What holds for all of them, the registry over."""

import copy
import functools
import math

import pytest
import torch

from constructions import CONSTRUCTIONS, Construction, Layout, StreamConstruction, ThroughNorm
from constructions.construction import short
from constructions.layout import POSITION
from probe.errors import ProbeError
from probe.models.checkpoint import load, save
from probe.models.decoder import Decoder

every = pytest.mark.parametrize("construction", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
PAIRS = [(each, dtype) for each in CONSTRUCTIONS.values() for dtype in each.max_length]
every_dtype = pytest.mark.parametrize(("construction", "dtype"), PAIRS, ids=lambda x: getattr(x, "name", str(x)))


# Those whose inner construction is looked at anyway, and whose building takes a second, are left out of some tests.
PLAIN = {name: each for name, each in CONSTRUCTIONS.items() if not isinstance(each, ThroughNorm)}
every_plain = pytest.mark.parametrize("construction", PLAIN.values(), ids=PLAIN)


F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
INTEGERS = {"position": 0.0, "digits": 0.0}
FITTED = {F64: {"scores": 1e-9, "pattern": 1e-9}, F32: {"scores": 5e-3, "pattern": 1e-3}}
HEADS = ("self", "previous", "back", "first", "window")


def heads(most: float, others: float) -> dict[str, float]:
    return dict.fromkeys(HEADS, most) | {"evenness": others, "values": others}


# What is promised: layers, those that attend and those with an MLP; tokens and tolerance by dtype. The content of a
# stream is never touched. Whoever weakens a claim has to do it here as well.
CLAIMS = {
    "absolute_position": ((1, 1, 1), {F64: (4096, {"position": 1e-8}), F32: (2048, {"position": 0.25})}),
    "closed_form": (
        (1, 1, 1),
        {F64: (16384, {"position": 1e-8}), F32: (16384, {"position": 0.05}), BF16: (64, {"position": 0.49})},
    ),
    "chords": ((1, 1, 1), {F64: (2**17, {"position": 0.25 + 1e-8}), F32: (2**17, {"position": 0.4})}),
    "exact_position": ((2, 1, 2), dict.fromkeys((F64, F32), (2**17, {"position": 0.0, "bits": 0.0}))),
    "newton": ((4, 1, 4), {F64: (2**17, {"position": 1e-4}), F32: (2**17, {"position": 0.25})}),
    "counting_head": ((1, 1, 0), {F64: (2**17, {"position": 0.055}), F32: (4096, {"position": 0.4})}),
    "odometer_two": ((3, 2, 3), dict.fromkeys((F64, F32, BF16), (64 * 128 + 1, INTEGERS))),
    "odometer_three": ((4, 3, 4), dict.fromkeys((F64, F32, BF16), (2048 * 64 + 1, INTEGERS))),
    "relative_position": (
        (2, 2, 1),
        {F64: (2048, {"scores": 1e-8, "pattern": 1e-9}), F32: (1024, {"scores": 0.05, "pattern": 0.01})},
    ),
    "exact_alibi": (
        (3, 2, 2),
        {F64: (8192, {"scores": 1e-10, "pattern": 1e-12}), F32: (8192, {"scores": 2e-3, "pattern": 1e-6})},
    ),
    "logarithmic_bias": (
        (4, 2, 3),
        {F64: (1024, FITTED[F64] | {"wanted": 0.05}), F32: (1024, FITTED[F32] | {"wanted": 0.051})},
    ),
    "t5_bias": (
        (4, 2, 3),
        {F64: (1024, FITTED[F64] | {"wanted": 0.06}), F32: (1024, FITTED[F32] | {"wanted": 0.061})},
    ),
    "rotary_kernel": (
        (4, 2, 3),
        {F64: (1024, FITTED[F64] | {"wanted": 1e-9}), F32: (1024, FITTED[F32] | {"wanted": 0.001})},
    ),
    "positional_heads": ((4, 2, 3), {F64: (2**16 - 1, heads(1e-7, 1e-7)), F32: (2**16 - 1, heads(1e-5, 1e-5))}),
    "positional_heads_odometer": (
        (7, 3, 6),
        {F64: (8193, heads(1e-6, 1e-7)), F32: (8193, heads(1e-6, 1e-5)), BF16: (8193, heads(1e-6, 1e-2))},
    ),
}
THROUGH = {"exact_position": (F64, F32), "odometer_two": (BF16,)}
THROUGH |= {"positional_heads": (F64, F32), "positional_heads_odometer": (BF16,)}
CLAIMS |= {
    f"{name}_through_{norm}_norm": (CLAIMS[name][0], {dtype: CLAIMS[name][1][dtype] for dtype in dtypes})
    for norm in ("rms", "layer")
    for name, dtypes in THROUGH.items()
}


def test_claims_are_no_weaker_than_they_were():
    assert list(CONSTRUCTIONS) == list(CLAIMS)
    for name, construction in CONSTRUCTIONS.items():
        layers, by_dtype = CLAIMS[name]
        assert (construction.layers, construction.attention_layers, construction.mlp_layers) == layers, name
        assert construction.max_length == {dtype: longest for dtype, (longest, _) in by_dtype.items()}, name
        of_stream = isinstance(construction, StreamConstruction)
        for dtype, (_, tolerance) in by_dtype.items():
            wanted = tolerance | ({"content": 0.0} if of_stream else {})
            assert construction.tolerance[dtype] == pytest.approx(wanted, rel=1e-5, abs=0), (name, dtype)


@functools.cache
def built(construction: Construction, dtype: torch.dtype) -> Decoder:
    """One decoder for all tests that only look."""
    return construction.build(48, dtype)


def first_dtype(construction: Construction) -> torch.dtype:
    return next(iter(construction.max_length))


@every_dtype
def test_the_claim_holds_at_the_shortest_lengths_on_every_path(construction, dtype):
    decoder = built(construction, dtype)
    for attention in construction.attention_paths:
        for length in (1, 3, 48):
            # One made for longer sequences serves shorter ones; the shortest is made for itself.
            made = construction.build(1, dtype) if length == 1 and attention == "explicit" else decoder
            rows = construction.check(length, dtype, decoder=made, attention=attention)
            assert rows.holds.all(), rows[["quantity", "length", "largest_error", "first_failure"]]


@every
def test_the_claim_wants_one_bos_at_the_first_place(construction):
    dtype = first_dtype(construction)
    decoder = built(construction, dtype)
    for at in ((0, 20), (), (9,), (0, 1)):
        tokens = construction.tokens(48)
        tokens[:, 0] = 7
        tokens[:, list(at)] = 0
        rows = construction.check(48, dtype, decoder=decoder, tokens=tokens)
        assert not rows.holds.all(), at


@every_dtype
def test_lengths_beyond_the_claim_are_refused(construction, dtype):
    longest = construction.max_length[dtype]
    for call in (construction.build, construction.check):
        for length in (longest + 1, 0):
            with pytest.raises(ProbeError, match=rf"claimed for lengths 1…{longest} in {short(dtype)}, got {length}$"):
                call(length, dtype)
    with pytest.raises(ProbeError, match=r"is made for .*; got float16$"):
        construction.check(8, torch.float16)


@every
def test_it_is_a_plain_decoder_and_counts_its_layers_honestly(construction):
    assert CONSTRUCTIONS[construction.name] is construction
    assert construction.claim and "\n" not in construction.claim and construction.source
    assert construction.max_length.keys() == construction.tolerance.keys()
    decoder = built(construction, first_dtype(construction))
    assert type(decoder) is Decoder and not decoder.training
    assert decoder.config == construction.config(48) and decoder.config.n_layers == construction.layers
    assert decoder.config.encoding == "none"
    assert decoder.config.normalization == getattr(construction, "normalization", "none")
    if not isinstance(construction, ThroughNorm):  # there other heads and units work in every layer
        attends = [bool(layer.attention.v_proj.weight.any()) for layer in decoder.layers]
        looks = [bool(layer.attention.q_proj.weight.any()) for layer in decoder.layers]
        thinks = [bool(layer.mlp.down_proj.weight.any()) for layer in decoder.layers]
        used = [a or b for a, b in zip(attends, looks, strict=True)]
        assert (sum(used), sum(thinks)) == (construction.attention_layers, construction.mlp_layers)


@pytest.mark.parametrize("length", [1, 48])
@every_plain
def test_nothing_in_it_is_idle(construction, length):
    """Every layer does something, and there are no more rows of the stream, heads, dimensions and units than are used.

    The position's own row stays empty where its bits alone are wanted, and so does the sine of the frequency 0.
    """
    decoder = construction.written(length, first_dtype(construction))
    config, layout = decoder.config, construction.layout(length) if hasattr(construction, "layout") else Layout()
    attends, units, heads, dimensions = [], [], set(), set()
    rows = {int(row) for row in decoder.token_embedding.weight.any(0).nonzero()}
    for layer in decoder.layers:
        attention, mlp = layer.attention, layer.mlp
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            for row in projection.weight.any(1).nonzero().flatten().tolist():
                heads.add(row // config.d_head)
                dimensions.add(row % config.d_head)
        attends.append(bool(attention.q_proj.weight.any() or attention.v_proj.weight.any()))
        units.append(mlp.down_proj.weight.any(0).nonzero().flatten().tolist())
        assert units[-1] == list(range(len(units[-1])))
        for written in (attention.o_proj.weight, mlp.down_proj.weight):
            rows |= {int(row) for row in written.any(1).nonzero()}
    assert all(some or any_units for some, any_units in zip(attends, units, strict=True))
    assert config.d_mlp == max(1, *map(len, units))
    assert heads == set(range(config.n_heads))
    # Four dimensions where one is used: √4 is a power of two.
    assert dimensions == set(range(config.d_head)) or (dimensions == {0} and config.d_head == 4)
    idle = set(range(config.d_model)) - rows
    zero_sine = {layout["sin"][0]} if construction.name in ("logarithmic_bias", "t5_bias") else set()
    assert idle in (zero_sine, zero_sine | {POSITION})
    assert (POSITION in idle) == ("heads" in construction.name or "odometer" in construction.name or "sin" in layout)


@every
def test_every_position_is_looked_at_and_named_from_1_on(construction):
    dtype = first_dtype(construction)
    t, errors = construction.errors(built(construction, dtype), construction.tokens(48), "explicit")
    assert t.tolist() == list(range(1, 49))
    assert construction.tolerance[dtype].keys() <= errors.keys()
    assert all(error.shape == (48,) and (error >= 0).all() for error in errors.values())


@pytest.mark.parametrize("construction", [CONSTRUCTIONS[name] for name in ("closed_form", "newton", "exact_position")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_weights_are_computed_in_float64_and_only_then_rounded(construction, dtype):
    written = construction.written(16, dtype)
    built = construction.build(16, dtype)
    assert built.dtype == dtype and all(parameter.isfinite().all() for parameter in built.parameters())
    for name, parameter in written.named_parameters():
        torch.testing.assert_close(built.get_parameter(name), parameter.to(dtype), rtol=0, atol=0)
    if not construction.dtype_specific:
        for name, parameter in construction.written(16, first_dtype(construction)).named_parameters():
            torch.testing.assert_close(written.get_parameter(name), parameter, rtol=0, atol=0)


def test_sequences_are_those_of_the_claim():
    construction = CONSTRUCTIONS["absolute_position"]
    tokens = construction.tokens(500, seed=3)
    assert tokens.shape == (1, 500) and tokens[0, 0] == 0 and (tokens[0, 1:] > 0).all()
    assert len(tokens.unique()) == construction.config(500).d_vocab
    assert tokens.equal(construction.tokens(500, seed=3)) and not tokens.equal(construction.tokens(500, seed=4))
    assert construction.tokens(500).equal(construction.tokens(500, seed=0))


def test_a_row_says_how_far_off_it_is_and_where_first():
    construction, t = CONSTRUCTIONS["closed_form"], torch.tensor([4, 2, 9, 7])
    errors = {"position": torch.tensor([0.05, 0.06, 0.01, torch.nan]), "content": torch.tensor([0.0, -0.0, 0.0, 0.0])}
    position, content = construction.rows(t, {k: v.double() for k, v in errors.items()}, 16, F32, "fused", 15)
    shared = {"construction": "closed_form", "claim": construction.claim, "source": construction.source}
    shared |= {"length": 16, "dtype": "float32", "attention": "fused", "attention_layers": 1, "mlp_layers": 1}
    shared |= {"width": 15, "positions_checked": 4}
    off = {"quantity": "position", "largest_error": math.inf, "tolerance": 0.05, "holds": False, "first_failure": 2}
    assert position == shared | off
    right = {"quantity": "content", "largest_error": 0.0, "tolerance": 0.0, "holds": True, "first_failure": None}
    assert content == shared | right
    (other,) = construction.rows(t, errors, 16, F32, "fused", 15, {"position": 0.055})
    assert (other["tolerance"], other["first_failure"]) == (0.055, 2)
    without_mlp = CONSTRUCTIONS["counting_head"].rows(t, errors, 16, F32, "fused", 15)
    assert [row["width"] for row in without_mlp] == [0, 0]


@every_plain
def test_a_broken_decoder_never_holds(construction):
    dtype = first_dtype(construction)
    decoder = copy.deepcopy(built(construction, dtype))
    with torch.no_grad():
        for layer in decoder.layers:
            layer.attention.v_proj.weight.fill_(torch.nan)
    rows = construction.check(48, dtype, decoder=decoder)
    assert not rows.holds.any() if "scores" not in set(rows.quantity) else not rows.holds.all()


@every
def test_a_checkpoint_holds_it(construction, tmp_path):
    dtype = first_dtype(construction)
    save(built(construction, dtype), tmp_path / "model")
    again = load(tmp_path / "model")
    rows = construction.check(48, again.dtype, decoder=again.eval())
    assert again.dtype == dtype and rows.holds.all()
