"""What figures of variants of a model share: names, colours, marks, panels, and which variant was made for a length."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from probe.report.drawing import plain
from probe.report.style import STRONG, colour

VARIANTS = {
    "none": "no change",
    "uniform": "uniform scale",
    "head": "head scale",
    "head_free": "head scale, no limit",
    "head_from_one": "head scale, from 1",
    "head_free_from_one": "head scale, neither",
    "search": "head scale, searched",
    "log_length": "scale by ln of the length",
    "linear": "position interpolation",
    "ntk": "NTK-aware",
    "yarn": "YaRN",
    "dropped": "encoding dropped",
    "dropped_uniform": "encoding dropped, scaled",
}
# Okabe and Ito's colours but their yellow, and some of Tol's; marks tell them apart, too.
VARIANT_COLOURS = {
    "none": "#000000",
    "uniform": "#56B4E9",
    "head": "#0072B2",
    "head_free": "#332288",
    "head_from_one": "#44AA99",
    "head_free_from_one": "#AA4499",
    "search": "#882255",
    "log_length": "#009E73",
    "linear": "#E69F00",
    "ntk": "#D55E00",
    "yarn": "#CC79A7",
    "dropped": "#7F7F7F",
    "dropped_uniform": "#999933",
}
MARKS = (
    *("circle", "square", "diamond", "cross", "hourglass", "bowtie", "star-square", "triangle-up", "x", "star"),
    *("triangle-down", "pentagon", "hexagon"),
)
TRAINED = "trained length"


def matched(rows: pd.DataFrame, train_length: int, at: str, *other: str) -> pd.DataFrame:
    """Of each variant, at each length in column ``at``, the row made for the shortest extension that reaches it; rows
    without an extension as they are. Where none reaches that far there is no row."""
    length = rows[at].astype(float) + (at == "position")  # the token at position p sees p + 1
    extension = rows["extension"].astype(float)
    fits = rows[extension.isna() | (extension * (1 + 1e-9) >= length / train_length)]
    by = ["model", "variant", at, *other]
    return fits.sort_values("extension", kind="stable").drop_duplicates(by).sort_index()


def ordered(variants: Iterable[str]) -> list[str]:
    """Each variant once, known ones first."""
    there = list(dict.fromkeys(variants))
    return [v for v in VARIANTS if v in there] + [v for v in there if v not in VARIANTS]


def label(variant: str) -> str:
    return plain(VARIANTS.get(variant, variant))


def stroke_of(variant: str) -> str:
    return VARIANT_COLOURS.get(variant) or colour(variant)


def mark_of(variant: str) -> str:
    return MARKS[list(VARIANTS).index(variant)] if variant in VARIANTS else "asterisk-open"


def made_for(extension: float) -> str:
    return "" if pd.isna(extension) else f", made for {extension:g}×"


def multiple_of(length: float, train_length: int) -> str:
    return f"{length:g}<br>({round(length / train_length, 2):g}×)"


def first_of(name: str, shown: set[str]) -> bool:
    """Whether a name is new to the legend, which has it from now on."""
    new = name not in shown
    shown.add(name)
    return new


def position_ticks(train_length: int, last: float, first: float = 1.0, *, fewer: bool = False) -> dict[str, Any]:
    """The trained length and its doublings; powers of 4, or of 16, below it."""
    first = max(first, 1.0)
    below = [float(n) for n in (16 if fewer else 4) ** np.arange(12.0) if first <= n < train_length / 1.5]
    above = [train_length * 2.0**k for k in range(24) if train_length * 2.0**k <= 1.05 * last]
    above = above[:: 2 if fewer and len(above) > 2 else 1]
    return {
        "tickvals": [*below, *above],
        "ticktext": [*(f"{n:g}" for n in below), *(multiple_of(n, train_length) for n in above)],
        "range": [math.log10(first), math.log10(1.05 * max(last, first + 1))],
    }


def mark_trained(figure: go.Figure, places: Sequence[dict[str, int]], train_length: int) -> None:
    """A dotted line at the trained length in every panel, named in the legend."""
    for place in places:
        figure.add_vline(x=train_length, line_width=1.5, line_dash="dot", line_color=STRONG, opacity=0.8, **place)
    legend_line(figure, TRAINED, {"color": STRONG, "width": 1.5, "dash": "dot"})


def legend_line(figure: go.Figure, name: str, line: dict[str, Any]) -> None:
    figure.add_scatter(x=[None], y=[None], mode="lines", name=name, legendgroup=name, line=line, row=1, col=1)
