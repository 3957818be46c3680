"""What figures are drawn with: intervals as bars and bands, numbers and names as text."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from probe.errors import ProbeError
from probe.rows import SINK


def interval_bars(line: pd.DataFrame, width: int = 2, thickness: float = 1) -> dict[str, Any]:
    """Error bars from value, low and high."""
    return {
        "type": "data",
        "symmetric": False,
        "thickness": thickness,
        "width": width,
        "array": (line["high"] - line["value"]).tolist(),
        "arrayminus": (line["value"] - line["low"]).tolist(),
    }


def add_band(figure: go.Figure, x: list[Any], line: pd.DataFrame, colour: str, group: str, **place: int) -> None:
    """The interval of a line, from low to high, as a band; nothing where there is no interval."""
    if len(line) and line[["low", "high"]].notna().all(axis=None):
        figure.add_scatter(
            x=x + x[::-1], y=[*line["high"], *line["low"][::-1]], fill="toself", mode="none", opacity=0.18,
            fillcolor=colour, hoverinfo="skip", showlegend=False, legendgroup=group, **place,
        )  # fmt: skip


def interval(value: float, low: float, high: float) -> str:
    """``0.117 [0.114, 0.120]``"""
    return f"{signed_zero(value)} [{signed_zero(low)}, {signed_zero(high)}]"


def signed_zero(value: float, form: str = ".3f") -> str:
    """A number as text, of which what rounds to nothing has no sign."""
    text = format(value, form)
    return text.replace("-", "") if text.startswith("-") and not text.strip("-0.") else text


def counted(rows: pd.DataFrame, what: str = "sequences", column: str = "n") -> str:
    """ " (n = 128 sequences)", " (n = 12–80 sequences)" for the title of an axis; nothing where rows do not say."""
    if column not in rows or rows[column].isna().all():
        return ""
    least, most = int(rows[column].min()), int(rows[column].max())
    return f" (n = {least:,}{'' if least == most else f'–{most:,}'}{f' {what}' if what else ''})"


def short_site(site: str) -> str:
    """``blocks.0.hook_resid_post`` -> ``0.resid_post``."""
    return site.removeprefix("blocks.").replace("hook_", "")


def matrix(part: pd.DataFrame, value: str) -> np.ndarray:
    """Query × key, the future left blank. A learned sink is the first of the keys, -1."""
    table = part.pivot(index="query", columns="key", values=value)
    matrix = table.to_numpy(dtype=np.float32)  # all that an eye can see
    n_query, n_key = matrix.shape
    seen = np.tri(n_query, n_key, k=int(SINK in table.columns)) > 0
    return np.where(seen, matrix, np.nan)


def plain(text: object) -> str:
    """Text as plotly should show it: it reads some HTML in titles and labels, and names come from outside."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def some(rows: pd.DataFrame, what: str) -> pd.DataFrame:
    """The rows, with a column "model" (``with_model``).

    Raises:
        ProbeError: where there is none.
    """
    if rows.empty:
        raise ProbeError(f"a figure of {what} needs at least one row, got none")
    return with_model(rows)


def with_model(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that say in "model" which model they are of. Rows of format 1 said it in "encoding"."""
    return rows if "model" in rows or "encoding" not in rows else rows.assign(model=rows["encoding"])
