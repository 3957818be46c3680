"""What stands in the cells of tables: what a cell says, the unrounded numbers behind it, what it is sorted by."""

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import pandas as pd

# A number that a text begins with: "0.117 [0.114, 0.120]", "−0.3", "12 of 12", "83%", "1,024", "1.00e-12", "2×".
_LEADING = re.compile(r"\s*([+\-−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:e[+\-−]?\d+)?)(?=$|[\s%×])", re.IGNORECASE)


@dataclass(frozen=True)
class Told:
    """A cell that says more than one number, or says it shortly.

    ``numbers`` are unrounded, by name; "" is the value itself, by which columns are sorted. A downloaded table has a
    column for each: "t5", "t5 low", "t5 high".
    """

    text: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


def text_of(value: object) -> str:
    """A cell in words: numbers short enough to be read, nothing where nothing is known."""
    if _is_missing(value):
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"
    return str(value)


FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets take for the beginning of a formula


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def sort_keys(column: Sequence[object]) -> list[float | None]:
    """What a column is sorted by as numbers, None for a missing cell; all None where a cell is no number.

    A cell's number is its own, that which it tells, or that with which its text begins.
    """
    keys = [None if text_of(value) == "" else _number_of(value) for value in column]
    return [None] * len(keys) if any(key is not None and math.isnan(key) for key in keys) else keys


def table_csv(table: pd.DataFrame) -> str:
    """A table with every number unrounded, as CSV; cells that tell several numbers make several columns."""
    names, columns = [], []
    for i, name in enumerate(map(str, table.columns)):
        cells = table.iloc[:, i].tolist()
        parts = list(dict.fromkeys(part for cell in cells if isinstance(cell, Told) for part in cell.numbers))
        for part in parts or [""]:
            names.append(f"{name} {part}".strip())
            columns.append([_part(cell, part, bool(parts)) for cell in cells])
    return harmless_csv(pd.DataFrame(dict(enumerate(columns)), dtype=object), names)


def harmless_csv(rows: pd.DataFrame, names: Sequence[str] | None = None) -> str:
    """Rows as CSV, every number unrounded. Text that a spreadsheet would run as a formula gets a ``'`` in front.

    Args:
        rows: the rows.
        names: the heads of the columns, by default those of the rows.
    """
    harmless = rows.copy(deep=False)
    for i, dtype in enumerate(rows.dtypes):
        if not (pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype)):
            harmless.isetitem(i, rows.iloc[:, i].map(_harmless, na_action="ignore"))
    heads = [str(_harmless(name)) for name in (rows.columns if names is None else names)]
    return harmless.to_csv(index=False, header=heads)


def _harmless(cell: object) -> object:
    """The cell itself, or its text behind a ``'``: a number is no formula, though it may begin with a sign."""
    if not isinstance(cell, str) or not cell.startswith(FORMULAS):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def _part(cell: object, part: str, split: bool) -> object:
    if isinstance(cell, Told):
        return cell.numbers.get(part) if split else cell.text
    return cell if part == "" else None


def _is_missing(value: object) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _number_of(value: object) -> float:
    """A cell's number, NaN where it has none."""
    if isinstance(value, Told) and "" in value.numbers:
        return float(value.numbers[""])
    if is_number(value):
        return float(value)
    found = _LEADING.match(str(value))
    try:
        return float(found[1].replace("−", "-").replace(",", "")) if found else math.nan
    except ValueError:  # "e5", "-", ""
        return math.nan
