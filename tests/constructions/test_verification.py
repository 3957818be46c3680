import pytest
import torch

import constructions
from constructions import CONSTRUCTIONS, AbsolutePosition, Construction, verify
from probe.errors import ProbeError
from probe.models.decoder import Decoder

COLUMNS = ["construction", "claim", "quantity", "source", "length", "dtype", "attention"]
COLUMNS += ["largest_error", "tolerance", "holds"]


def test_every_claim_holds():
    rows = verify()
    assert list(rows.columns) == COLUMNS
    assert rows.holds.all(), rows[~rows.holds]
    assert (rows.largest_error <= rows.tolerance).all()
    assert set(rows.construction) == set(CONSTRUCTIONS)
    assert not rows.duplicated(["construction", "quantity", "length", "dtype", "attention"]).any()
    assert set(zip(rows.length, rows.dtype, strict=True)) == {
        (length, dtype) for length in (64, 256, 1024) for dtype in ("float64", "float32")
    }
    # Nothing is so exact that the check compared a value with itself.
    assert (rows[rows.quantity != "content"].largest_error > 0).all()


def test_paths_that_hold_no_pattern_are_left_to_the_claims_without_one():
    rows = verify(lengths=(16,), dtypes=(torch.float64,), attention=("explicit", "fused"))
    assert rows.holds.all()
    assert rows.groupby("attention").construction.unique().map(list).to_dict() == {
        "explicit": ["absolute_position", "relative_position"],
        "fused": ["absolute_position"],
    }
    with pytest.raises(ProbeError, match=r"at least one construction, .* attention path \(of: explicit\)"):
        verify(["relative_position"], lengths=(16,), attention=("fused",))


def test_constructions_are_taken_by_name_or_as_they_are():
    by_name = verify(["absolute_position"], lengths=(8,))
    assert by_name.equals(verify([AbsolutePosition()], lengths=(8,)))
    with pytest.raises(
        ProbeError, match=r"unknown construction 'absolut'; known: absolute_position, relative_position"
    ):
        verify(["absolut"])
    with pytest.raises(ProbeError, match=r"claimed for lengths 1…2048 in float32, got 4096"):
        verify(["absolute_position"], lengths=(4096,))


def test_a_construction_that_fails_is_said_to_fail():
    class Wrong(AbsolutePosition):
        def build(self, length, dtype=torch.float64):
            return constructions.perturbed(super().build(length, dtype), "layers.0.mlp.down_proj.bias", (2,))

    rows = verify([Wrong()], lengths=(8,), dtypes=(torch.float64,)).set_index("quantity")
    assert not rows.holds["position"] and rows.holds["content"]


@pytest.mark.parametrize("construction", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_every_construction_is_a_plain_decoder(construction: Construction):
    assert CONSTRUCTIONS[construction.name] is construction
    assert construction.claim and "\n" not in construction.claim and construction.source
    assert construction.max_length.keys() == construction.tolerance.keys() >= {torch.float64, torch.float32}
    assert min(construction.max_length.values()) >= 1024
    for dtype in construction.max_length:
        decoder = construction.build(16, dtype)
        config = decoder.config
        assert type(decoder) is Decoder and decoder.dtype == dtype and not decoder.training
        assert config == construction.config(16) and config.n_layers == construction.layers
        assert (config.encoding, config.normalization, config.activation, config.bias) == ("none", "none", "relu", True)
        # The weights are computed in float64 and only then rounded.
        for name, parameter in construction.build(16).named_parameters():
            torch.testing.assert_close(decoder.get_parameter(name), parameter.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("construction", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_the_sequences_are_those_of_the_claim(construction: Construction):
    tokens = construction.tokens(500, seed=3)
    assert tokens.shape == (1, 500) and tokens[0, 0] == 0 and (tokens[0, 1:] > 0).all()
    assert len(tokens.unique()) == construction.config(500).d_vocab
    assert tokens.equal(construction.tokens(500, seed=3)) and not tokens.equal(construction.tokens(500, seed=4))
    assert construction.check(500, tokens=construction.tokens(500, seed=4)).holds.all()
