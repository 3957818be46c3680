"""Rows chosen, and put into tables and words."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from probe.report.cells import Told
from probe.report.drawing import interval, with_model

MISSING = ("failed", "skipped")  # metrics of rows that say why a measurement was not made


def of(rows: pd.DataFrame, measurement: str, **where: Any) -> pd.DataFrame:
    """The rows of a measurement that have these values in these columns; not those that say why it was not made."""
    kept = with_model(rows[(rows["measurement"] == measurement) & ~rows["metric"].isin(MISSING)])
    for column, value in where.items():
        kept = kept[kept[column] == value] if column in kept else kept[:0]
    return kept


def interval_of(row: Mapping[str, Any] | pd.Series, say: Callable[..., str] = interval) -> Told:
    """A row's value and interval in words, with the numbers themselves."""
    value, low, high = (row[name] for name in ("value", "low", "high"))
    return Told(say(value, low, high), known({"": value, "low": low, "high": high}))


def beside(value: float, other: float, what: str, form: str = "{:.3f}", other_form: str | None = None) -> Told:
    """A value and, in parentheses, another one that is called so; what is missing is not said."""
    text = "" if pd.isna(value) else form.format(value)
    if pd.notna(other):
        text = f"{text} ({(other_form or form).format(other)})"
    return Told(text, known({"": value, what: other}))


def known(numbers: Mapping[str, float]) -> dict[str, float]:
    """Those that are not missing, as Python's own numbers."""
    return {name: float(number) for name, number in numbers.items() if pd.notna(number)}


def beside_untrained(rows: pd.DataFrame, index: str, form: str = "{:.3f}") -> pd.DataFrame:
    """The mean of values, a row an ``index``, one column per model; the untrained model's mean in parentheses."""
    mean = rows.pivot_table(index=index, columns=["model", "control"], values="value", sort=False)
    encodings = list(dict.fromkeys(rows["model"]))

    def cell(row: pd.Series, encoding: str) -> Told | str:
        trained, untrained = (row.get((encoding, control), float("nan")) for control in ("none", "untrained"))
        if pd.isna(trained) and pd.isna(untrained):
            return ""
        return beside(0 if pd.isna(trained) else trained, untrained, "untrained", form)

    found = [{index: name} | {e: cell(row, e) for e in encodings} for name, row in mean.iterrows()]
    return by_model(found, [index, *encodings])


def by_model(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """A table whose columns, except the first ones, are models."""
    return pd.DataFrame(rows, columns=list(columns)).rename_axis(columns="model")
