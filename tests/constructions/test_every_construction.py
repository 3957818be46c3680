"""What holds for all of them, the registry over."""

import copy
import functools

import pytest
import torch

from constructions import CONSTRUCTIONS, Construction, ThroughNorm
from constructions.construction import short
from probe.errors import ProbeError
from probe.models.checkpoint import load, save
from probe.models.decoder import Decoder

every = pytest.mark.parametrize("construction", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
PAIRS = [(each, dtype) for each in CONSTRUCTIONS.values() for dtype in each.max_length]
every_dtype = pytest.mark.parametrize(("construction", "dtype"), PAIRS, ids=lambda x: getattr(x, "name", str(x)))


# Those whose inner construction is looked at anyway, and whose building takes a second, are left out of some tests.
PLAIN = {name: each for name, each in CONSTRUCTIONS.items() if not isinstance(each, ThroughNorm)}
every_plain = pytest.mark.parametrize("construction", PLAIN.values(), ids=PLAIN)


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
