"""Rows chosen, and put into tables and words."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from probe.report.figures import interval


def of(rows: pd.DataFrame, measurement: str, **where: Any) -> pd.DataFrame:
    """The rows of a measurement, with those values in those columns."""
    kept = rows[rows["measurement"] == measurement]
    for column, value in where.items():
        kept = kept[kept[column] == value] if column in kept else kept[:0]
    return kept


def interval_of(row: Mapping[str, Any] | pd.Series) -> str:
    """A row's value and interval in words."""
    return interval(row["value"], row["low"], row["high"])


def beside_untrained(rows: pd.DataFrame, index: str, form: str = "{:.3f}") -> pd.DataFrame:
    """The mean of values, a row an ``index``, a column an encoding; the untrained model's in parentheses."""
    mean = rows.pivot_table(index=index, columns=["encoding", "control"], values="value", sort=False)
    encodings = list(dict.fromkeys(rows["encoding"]))

    def cell(row: pd.Series, encoding: str) -> str:
        trained, untrained = (row.get((encoding, control), float("nan")) for control in ("none", "untrained"))
        if pd.isna(trained) and pd.isna(untrained):
            return ""
        text = form.format(0 if pd.isna(trained) else trained)
        return text if pd.isna(untrained) else f"{text} ({form.format(untrained)})"

    return pd.DataFrame(
        [{index: name} | {e: cell(row, e) for e in encodings} for name, row in mean.iterrows()],
        columns=[index, *encodings],
    )
