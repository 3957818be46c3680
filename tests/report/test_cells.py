import math

import numpy as np
import pandas as pd
import pytest

from probe.report.cells import Told, sort_keys, table_csv, text_of
from probe.report.tables import beside, interval_of


def test_numbers_are_short_enough_to_be_read():
    told = [text_of(v) for v in (0.5, 1e-12, 12345.6, 0.0, 3, "x", None, pd.NA, math.nan, math.inf, True)]
    assert told == ["0.500", "1.00e-12", "1.23e+04", "0.000", "3", "x", "", "", "", "inf", "True"]


@pytest.mark.parametrize(
    ("cell", "key"),
    [
        ("0.117 [0.114, 0.120]", 0.117),
        ("0.91 (+0.20)", 0.91),
        ("12 of 12", 12),
        ("1.00e-12", 1e-12),
        ("−0.3", -0.3),
        ("-0.3", -0.3),
        ("83%", 83),
        ("1,234,567", 1234567),
        ("2×", 2),
        (".5", 0.5),
        (np.float64(0.25), 0.25),
        (np.int64(7), 7),
        (Told("about one", {"": 1.25}), 1.25),
        (math.inf, math.inf),
    ],
)
def test_a_cell_is_sorted_by_the_number_that_it_says(cell, key):
    assert sort_keys([cell, "", None, math.nan]) == [key, None, None, None]


@pytest.mark.parametrize("other", ["t5", "7b", "1.2.3", "e5", "-", "2-layers", True])
def test_a_column_with_something_else_in_it_is_sorted_as_text(other):
    assert sort_keys(["0.5", other]) == [None, None]


def test_told_numbers_are_not_rounded():
    row = {"value": 1 / 3, "low": 0.1 + 0.2, "high": math.nan}
    cell = interval_of(row)
    assert str(cell) == "0.333 [0.300, nan]" and cell.numbers == {"": 1 / 3, "low": 0.1 + 0.2}
    assert str(beside(1 / 3, math.nan, "untrained")) == "0.333"
    table = pd.DataFrame({"name": ["=a", 'b"c', "d,e"], "x": [cell, beside(2, 1 / 7, "untrained"), ""], "n": [1, 2, 3]})
    assert table_csv(table) == (
        "name,x,x low,x untrained,n\n"
        "'=a,0.3333333333333333,0.30000000000000004,,1\n"
        '"b""c",2.0,,0.14285714285714285,2\n'
        '"d,e",,,,3\n'
    )


def test_columns_may_share_their_name():
    assert table_csv(pd.DataFrame([[1, 2]], columns=["x", "x"])) == "x,x\n1,2\n"
