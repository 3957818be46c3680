"""The table of limits, and its short lengths run again."""

import pandas as pd
import pytest
import torch

from constructions import CONSTRUCTIONS, AbsolutePosition
from constructions import limits as module
from constructions.limits import SAMPLES, SEARCHES, TABLE, _starts, first_failure, first_failure_sampled
from probe.errors import ProbeError

ROWS = pd.read_csv(TABLE)
SHORT = [(name, dtype, most) for name, dtype, most in SEARCHES if most <= 1024]


def tabled(name: str, dtype: torch.dtype, sampled: bool = False) -> pd.DataFrame:
    rows = ROWS[(ROWS.construction == name) & (ROWS.dtype == str(dtype).removeprefix("torch."))]
    return rows[(rows.positions_checked < rows.length) == sampled].set_index("quantity")


def test_every_search_has_its_row():
    for name, dtype, _ in SEARCHES:
        rows = tabled(name, dtype)
        if rows.empty:  # scores and patterns are looked at in windows
            rows = tabled(name, dtype, sampled=True)
        assert not rows.empty, (name, dtype)
    for name, dtype, length in SAMPLES:
        assert (tabled(name, dtype, sampled=True).length == length).any()


def test_every_search_went_to_its_end_or_to_a_failure():
    for name, dtype, most in SEARCHES:
        sampled = [length for other, kind, length in SAMPLES if (other, kind) == (name, dtype)]
        rows = ROWS[(ROWS.construction == name) & (ROWS.dtype == str(dtype).removeprefix("torch."))]
        rows = rows[~((rows.positions_checked < rows.length) & rows.length.isin(sampled))]
        (length,) = rows.length.unique()
        assert length == most or (length < most and not rows.holds.all() and (length / 64).is_integer()), (name, dtype)
        assert (rows.holds == rows.first_failure.isna()).all() and (rows.first_failure.dropna() <= length).all()
        # At a length that is claimed nothing fails.
        assert rows.holds.all() or length > CONSTRUCTIONS[name].max_length.get(dtype, 0), (name, dtype)


def test_windows_stand_at_every_fraction_of_an_octave_and_at_the_end():
    assert _starts(64, 16, 1) == [0, 16, 48]
    assert _starts(100, 16, 1) == [0, 16, 48, 84]
    assert _starts(40, 8, 2) == [0, 3, 8, 14, 24, 32]
    assert _starts(16, 16, 4) == _starts(10, 16, 4) == [0]
    # Where windows overlap a position is looked at once.
    seen = {position for start in _starts(2**20, 32, 4) for position in range(start, start + 32)}
    assert set(ROWS[ROWS.length == 2**20].positions_checked) == {len(seen)} == {1782}


@pytest.mark.parametrize(("least", "most"), [(0, 8), (8, 0), (-1, 8)])
def test_a_search_wants_a_length(least, most):
    with pytest.raises(ProbeError, match=f"least and most must be at least 1, got {least} and {most}"):
        first_failure(CONSTRUCTIONS["closed_form"], torch.float64, most, least)


def test_a_search_doubles_the_length_until_it_fails_or_ends():
    lengths = []

    class Fails(AbsolutePosition):
        def errors(self, decoder, tokens, attention):
            lengths.append(tokens.shape[1])
            t, errors = super().errors(decoder, tokens, attention)
            # A position fails when it is nearer to another integer than to its own.
            return t, errors | {"position": torch.where(t < 41, 0.499, 0.5)}

    rows = first_failure(Fails(), torch.float64, most=1000, least=10, attention="explicit").set_index("quantity")
    assert lengths == [10, 20, 40, 80]
    assert rows.first_failure["position"] == 41 and rows.holds["content"] and set(rows.length) == {80}
    assert set(rows.attention) == {"explicit"}
    lengths.clear()
    rows = first_failure(Fails(), torch.float64, most=33, least=10)
    assert lengths == [10, 20, 33] and rows.holds.all() and set(rows.attention) == {"fused"}
    lengths.clear()
    assert first_failure(Fails(), torch.float64, most=1, least=1).holds.all() and lengths == [1]


def test_main_makes_the_table_or_the_rows_of_some(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "TABLE", tmp_path / "limits.csv")
    searches = (("newton", torch.float64, 64), ("closed_form", torch.bfloat16, 128), ("closed_form", torch.float64, 16))
    monkeypatch.setattr(module, "SEARCHES", searches)
    monkeypatch.setattr(module, "SAMPLES", (("closed_form", torch.float32, 512),))
    module.main()
    assert torch.get_num_threads() == 1
    rows = pd.read_csv(module.TABLE)
    columns = CONSTRUCTIONS["newton"].check(2).columns.drop(["claim", "source"])
    assert list(rows.columns) == list(columns)
    keys = rows[["construction", "dtype", "length", "quantity"]].apply(tuple, axis=1).tolist()
    made = [("closed_form", "bfloat16", 128), ("closed_form", "float32", 512), ("closed_form", "float64", 16)]
    made.append(("newton", "float64", 64))
    assert keys == [(*key, quantity) for key in made for quantity in ("position", "content")]
    assert rows.positions_checked.tolist() == [128, 128, 374, 374, 16, 16, 64, 64]
    assert rows.first_failure[0] == 95 and rows.first_failure[1:].isna().all()
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1:4] for line in shown[::2]] == [
        list(map(str, key)) for key in (made[1], made[3], made[0], made[2])
    ]
    assert shown[4].split()[-1] == "95" and shown[4].split()[4] == "position"

    # The rows of one construction are made anew, those of the others stay as they are.
    rows.assign(largest_error=7.0, first_failure=3).to_csv(module.TABLE, index=False)
    module.main(["closed_form"])
    again = pd.read_csv(module.TABLE)
    assert again[:6].equals(rows[:6].astype(again.dtypes))
    assert again[6:].largest_error.tolist() == [7.0, 7.0] and again[6:].first_failure.tolist() == [3, 3]
    with pytest.raises(ProbeError, match="unknown construction in the table 'chords'; known: closed_form, newton"):
        module.main(["chords"])


@pytest.mark.parametrize(("name", "dtype", "most"), SHORT, ids=str)
def test_short_searches_find_what_the_table_says(name, dtype, most):
    found, table = first_failure(CONSTRUCTIONS[name], dtype, most).set_index("quantity"), tabled(name, dtype)
    assert found.first_failure.isna().equals(table.first_failure.isna())
    assert (found.first_failure.dropna() == table.first_failure.dropna()).all()
    assert (found.length == table.length).all()


@pytest.mark.parametrize(
    ("name", "dtype", "length"),
    [
        ("exact_position", torch.float32, 131072),
        ("odometer_two", torch.bfloat16, 8193),
        ("odometer_three", torch.bfloat16, 131073),
        ("closed_form", torch.float64, 16384),
        ("positional_heads", torch.float32, 65535),
        ("positional_heads_odometer", torch.bfloat16, 8193),
        ("exact_position_through_rms_norm", torch.float32, 131071),
        ("exact_position_through_layer_norm", torch.float32, 131071),
    ],
)
def test_targets_are_in_the_table(name, dtype, length):
    """Every row up to that length is right: the first that fails, if any, lies beyond."""
    rows = tabled(name, dtype)
    assert (rows.length >= length).all()
    assert (rows.first_failure.isna() | (rows.first_failure > length)).all()


def test_sampled_windows_agree_with_all_rows():
    construction = CONSTRUCTIONS["closed_form"]
    sampled = first_failure_sampled(construction, torch.bfloat16, 512, window=16).set_index("quantity")
    whole = first_failure(construction, torch.bfloat16, 512, least=512).set_index("quantity")
    assert sampled.first_failure["position"] >= whole.first_failure["position"] == 95
    assert sampled.positions_checked["position"] < 512
    with pytest.raises(ProbeError, match=r"sampling wants one attention layer, got 2"):
        first_failure_sampled(CONSTRUCTIONS["odometer_two"], torch.bfloat16, 64)
