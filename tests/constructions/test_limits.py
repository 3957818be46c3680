"""The table of limits, and its short lengths run again."""

import pandas as pd
import pytest
import torch

from constructions import CONSTRUCTIONS
from constructions.limits import SAMPLES, SEARCHES, TABLE, first_failure, first_failure_sampled
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
