import pandas as pd
import pytest
import torch

import constructions
from constructions import CONSTRUCTIONS, PROPOSITIONS, AbsolutePosition, Construction, verify
from constructions.construction import short
from probe.errors import ProbeError

COLUMNS = ["construction", "claim", "quantity", "source", "length", "dtype", "attention"]
COLUMNS += ["largest_error", "tolerance", "holds"]
COLUMNS += ["attention_layers", "mlp_layers", "width", "first_failure", "positions_checked"]


def test_the_default_level_is_three_lengths_in_two_dtypes():
    rows = verify(["absolute_position", "newton", "odometer_two_through_rms_norm", "constant_string"])
    assert list(rows.columns) == COLUMNS
    assert rows.holds.all(), rows[~rows.holds]
    assert (rows.largest_error <= rows.tolerance).all() and rows.first_failure.isna().all()
    assert not rows.duplicated(["construction", "quantity", "length", "dtype", "attention"]).any()
    assert set(rows.construction) == {"absolute_position", "newton", "constant_string"}  # the third is for bfloat16
    of_constructions = rows[rows.construction != "constant_string"]
    assert set(zip(of_constructions.length, of_constructions.dtype, strict=True)) == {
        (length, dtype) for length in (64, 256, 1024) for dtype in ("float64", "float32")
    }


@pytest.mark.slow
def test_the_quick_level_has_every_construction_on_every_path_that_it_has():
    rows = verify(level="quick", lengths=(64,))
    assert list(rows.columns) == COLUMNS and rows.holds.all(), rows[~rows.holds]
    assert set(rows.construction) == {*CONSTRUCTIONS, *PROPOSITIONS}
    assert set(rows.dtype) == {"float64", "float32", "bfloat16"}


def test_what_is_not_claimed_is_not_checked():
    rows = verify(["absolute_position", "closed_form"], lengths=(64, 256), dtypes=(torch.float32, torch.bfloat16))
    assert set(zip(rows.construction, rows.length, rows.dtype, strict=True)) == {
        ("absolute_position", 64, "float32"),
        ("absolute_position", 256, "float32"),
        ("closed_form", 64, "float32"),
        ("closed_form", 256, "float32"),
        ("closed_form", 64, "bfloat16"),
    }
    with pytest.raises(ProbeError, match=r"absolute_position: float64 to 4096, float32 to 2048$"):
        verify(["absolute_position"], lengths=(4097,))
    with pytest.raises(ProbeError, match=r"claimed for lengths 1…2048 in float32, got 4096"):
        AbsolutePosition().check(4096, torch.float32)


def test_paths_that_hold_no_pattern_are_left_to_the_claims_without_one():
    rows = verify(["absolute_position", "relative_position"], (16,), (torch.float64,), ("explicit", "fused"))
    assert rows.holds.all()
    assert rows.groupby("attention").construction.unique().map(list).to_dict() == {
        "explicit": ["absolute_position", "relative_position"],
        "fused": ["absolute_position"],
    }
    with pytest.raises(ProbeError, match=r"at least one construction .*of \['explicit'\]"):
        verify(["relative_position"], lengths=(16,), attention=("fused",))


def test_the_full_level_goes_to_the_longest_claims():
    rows = verify(["closed_form"], lengths=(8,), dtypes=(torch.bfloat16,), level="full")
    assert set(zip(rows.length, rows.dtype, rows.attention, strict=True)) == {
        (8, "bfloat16", "explicit"),
        (8, "bfloat16", "fused"),
        (64, "bfloat16", "fused"),
    }


@pytest.mark.parametrize(
    ("level", "lengths", "paths", "longest"),
    [
        ("quick", (64, 256), ("explicit", "fused"), {}),
        ("default", (64, 256, 1024), ("explicit",), {}),
        ("full", (64, 256, 1024), ("explicit", "fused"), {"float64": 4096, "float32": 2048}),
    ],
)
def test_levels_run_what_they_say_with_a_claims_own_tokens(level, lengths, paths, longest, monkeypatch):
    ran, told = [], []

    def check(self, length, dtype, decoder=None, tokens=None, attention="explicit"):
        assert torch.equal(tokens, self.tokens(length, 7))
        ran.append((self.name, length, short(dtype), attention))
        return pd.DataFrame({"construction": [self.name]})

    monkeypatch.setattr(Construction, "check", check)
    proposition = PROPOSITIONS["equal_tokens_in_layer_one"]
    wanted = ["absolute_position", "relative_position", "odometer_two_through_rms_norm", proposition]
    rows = verify(wanted, level=level, seed=7, on_progress=lambda done, total: told.append((done, total)))
    expected = [
        ("absolute_position", n, dtype, at) for n in lengths for dtype in ("float64", "float32") for at in paths
    ]
    expected += [("relative_position", n, dtype, "explicit") for n in lengths for dtype in ("float64", "float32")]
    expected += [("absolute_position", n, dtype, "fused") for dtype, n in longest.items()]
    if longest:
        expected.append(("relative_position", 2048, "float64", "explicit"))  # 1024 in float32 is a usual length
    if level != "default":
        name = "odometer_two_through_rms_norm"
        expected += [(name, n, "bfloat16", path) for n in lengths for path in paths]
        expected += [(name, 8193, "bfloat16", "fused")] * bool(longest)
    assert sorted(ran) == sorted(expected)
    assert rows.construction[: len(ran)].tolist() == [name for name, *_ in ran]
    assert rows.index.tolist() == list(range(len(rows))) and set(rows.construction[len(ran) :]) == {proposition.name}
    total = len(ran) + 1
    assert told[-1] == (total, total) and [done for done, _ in told] == sorted({done for done, _ in told})


def test_constructions_are_taken_by_name_or_as_they_are():
    by_name = verify(["absolute_position"], lengths=(8,))
    assert by_name.equals(verify([AbsolutePosition()], lengths=(8,)))
    rows = verify(["order_of_the_prefix"])
    assert rows.holds.all() and list(rows.columns) == COLUMNS
    with pytest.raises(ProbeError, match=r"unknown construction 'absolut'; known: absolute_position, "):
        verify(["absolut"])
    with pytest.raises(ProbeError, match=r"unknown level 'fast'; known: default, full, quick"):
        verify(level="fast")


def test_a_construction_that_fails_is_said_to_fail_and_where():
    class Wrong(AbsolutePosition):
        def build_unclaimed(self, length, dtype):
            decoder = super().build_unclaimed(length, dtype)
            return constructions.perturbed(decoder, "layers.0.mlp.down_proj.weight", (2, 4))

    rows = verify([Wrong()], lengths=(8,), dtypes=(torch.float64,)).set_index("quantity")
    assert not rows.holds["position"] and rows.holds["content"]
    # The hinge at 1/5 is open at x > 1/5: at all t < 5, the first of which is <bos>.
    assert rows.first_failure["position"] == 1 and rows.first_failure.isna()["content"]
    assert (rows.positions_checked == 8).all() and (rows.width == 8).all()


def test_claims_hold_on_other_sequences_too():
    names = ["absolute_position", "positional_heads", "order_of_the_prefix"]
    zero, one = (verify(names, lengths=(32,), seed=seed) for seed in (0, 1))
    assert one["holds"].all() and len(one) == len(zero)
    assert zero.equals(verify(names, lengths=(32,)))
    assert (one["largest_error"] != zero["largest_error"]).any()  # other tokens were drawn
