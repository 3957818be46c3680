"""What figures of variants of a model share: names, colours, marks, panels, and which variant was made for a length."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probe.report.figures import LAYOUT, colour, plain

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
SHADES = ["#ffffff", "#6baed6"]  # light enough for the numbers upon them
TRAINED = "trained length"
GREY = "#777777"


def matched(rows: pd.DataFrame, train_length: int, at: str, *other: str) -> pd.DataFrame:
    """Of each variant, at each length in column ``at``, the row made for the shortest extension that reaches it; rows
    without an extension as they are. Where none reaches that far there is no row."""
    length = rows[at].astype(float) + (at == "position")  # the token at position p sees p + 1
    extension = rows["extension"].astype(float)
    fits = rows[extension.isna() | (extension * (1 + 1e-9) >= length / train_length)]
    by = ["encoding", "variant", at, *other]
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


def position_ticks(train_length: int, last: float, first: float = 1.0, *, fewer: bool = False) -> dict:
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


def make_panels(
    groups: Sequence[Sequence[str]], *, most: int, height: int, gap: int = 70, legend: int = 0, right: int = 20,
    top: int = 50, shared_yaxes: str | bool = "all", beside: float = 0.03,
) -> tuple[go.Figure, list[dict[str, int]]]:  # fmt: skip
    """Panels with titles, and the place of each. Every group begins a row, and a row holds at most so many.

    ``height`` of a panel, ``gap`` between rows, ``right`` and ``top`` are pixels; ``legend`` is the number of entries,
    ``beside``, between columns, a share of the width.
    """
    n_columns = min(most, max(map(len, groups)))
    lines = [group[i : i + n_columns] for group in groups for i in range(0, len(group), n_columns)]
    drawn = len(lines) * height + (len(lines) - 1) * gap
    figure = make_subplots(
        rows=len(lines),
        cols=n_columns,
        specs=[[{} if column < len(line) else None for column in range(n_columns)] for line in lines],
        subplot_titles=[title for line in lines for title in line],
        shared_yaxes=shared_yaxes,
        horizontal_spacing=beside,
        vertical_spacing=gap / drawn if len(lines) > 1 else 0,
    )
    figure.update_annotations(font_size=13)
    below = 68  # ticks of two lines, and the title
    margin = {"l": 75, "r": right, "t": top, "b": below + 24 * -(-legend // 4)}
    figure.update_layout(
        **LAYOUT | {"margin": margin},
        height=drawn + margin["t"] + margin["b"],
        legend={"orientation": "h", "y": -below / drawn, "yanchor": "top"},
    )
    return figure, [{"row": r, "col": c} for r, line in enumerate(lines, 1) for c, _ in enumerate(line, 1)]


def colour_bar(title: str, figure: go.Figure) -> dict:
    """A colour bar of at most 300 pixels beside the top panels."""
    drawn = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    return {"title": title, "lenmode": "pixels", "len": min(300, drawn), "y": 1, "yanchor": "top"}


def titled(figure: go.Figure, title: str) -> go.Figure:
    """The same title on the vertical axes of the first column."""
    figure.update_yaxes(title=title, col=1)
    return figure


def title_lowest(figure: go.Figure, places: Sequence[dict[str, int]], title: str) -> None:
    """A title below each panel that has none below it."""
    for place in places:
        if {"row": place["row"] + 1, "col": place["col"]} not in places:
            figure.update_xaxes(title=title, title_standoff=8, **place)


def mark_trained(figure: go.Figure, places: Sequence[dict[str, int]], train_length: int) -> None:
    """A dotted line at the trained length in every panel, named in the legend."""
    for place in places:
        figure.add_vline(x=train_length, line_width=1.5, line_dash="dot", line_color="#D55E00", opacity=0.8, **place)
    legend_line(figure, TRAINED, {"color": "#D55E00", "width": 1.5, "dash": "dot"})


def legend_line(figure: go.Figure, name: str, line: dict) -> None:
    figure.add_scatter(x=[None], y=[None], mode="lines", name=name, legendgroup=name, line=line, row=1, col=1)
