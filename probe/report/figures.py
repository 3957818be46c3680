"""Rows -> figures. Every function takes tidy rows and returns a ``plotly.graph_objects.Figure``; none writes a file."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sequential
from plotly.subplots import make_subplots

from probe.errors import ProbeError

# Okabe and Ito's palette, told apart by colour-blind readers too. An encoding has the same colour everywhere.
COLOURS = {
    "none": "#000000",
    "t5": "#0072B2",
    "alibi": "#D55E00",
    "rotary": "#009E73",
    "sinusoidal": "#CC79A7",
    "learned": "#E69F00",
}
OTHER_COLOURS = ("#56B4E9", "#999999", "#8C564B", "#17BECF", "#7F7F00", "#5E4FA2")
DASHES = {"none": "solid", "untrained": "dash", "embedding": "dot", "shuffled": "dashdot", "random": "longdash"}
CONTROL_LABELS = {
    "none": "trained model",
    "untrained": "untrained model",
    "embedding": "token embedding alone",
    "shuffled": "shuffled positions",
    "random": "random projection of the token",
}
# Most attention weights are small: the colours are spread by the square root, so that 0.05 can be told from 0.
ATTENTION_SCALE = [[(i / (len(sequential.Blues) - 1)) ** 2, shade] for i, shade in enumerate(sequential.Blues)]
LAYOUT = {
    "template": "simple_white",
    "font": {"family": "Helvetica, Arial, sans-serif", "size": 13},
    "margin": {"l": 65, "r": 20, "t": 50, "b": 55},
    "hoverlabel": {"font_size": 12},
}


def colour(encoding: str) -> str:
    """The colour of an encoding (or of any other name), the same in every figure."""
    if encoding in COLOURS:
        return COLOURS[encoding]
    return OTHER_COLOURS[sum(encoding.encode()) % len(OTHER_COLOURS)]


def accuracy_by_length(rows: pd.DataFrame, train_length: int | None = None) -> go.Figure:
    """Exact match against length, a line an encoding, Wilson intervals as bands.

    Rows: encoding, length, value, low, high, n (rows without a length are left out).
    """
    rows = some(rows[rows["length"].notna()], "exact match by length")
    figure = go.Figure()
    for encoding, line in rows.groupby("encoding", sort=False):
        line = line.sort_values("length")
        x = line["length"].astype(int).tolist()
        figure.add_scatter(
            x=x + x[::-1],
            y=[*line["high"], *line["low"][::-1]],
            fill="toself",
            mode="none",
            opacity=0.15,
            fillcolor=colour(encoding),
            hoverinfo="skip",
            showlegend=False,
            legendgroup=encoding,
        )
        figure.add_scatter(
            x=x,
            y=line["value"].tolist(),
            name=encoding,
            legendgroup=encoding,
            mode="lines+markers",
            line={"color": colour(encoding)},
            customdata=line["n"].tolist(),
            hovertemplate="length %{x}: %{y:.3f} (n = %{customdata})<extra>" + plain(encoding) + "</extra>",
        )
    if train_length is not None:
        figure.add_vline(
            x=train_length + 0.5,
            line_width=1.5,
            line_dash="dot",
            opacity=0.8,
            line_color="#666666",
            annotation_text="longest trained",
            annotation_position="top left",
        )
    figure.update_xaxes(title="length")
    figure.update_yaxes(title="exact match", range=[-0.03, 1.05])
    return figure.update_layout(**LAYOUT, height=420)


def under_shift(rows: pd.DataFrame, beside: str = "exact_match") -> go.Figure:
    """Loss and another metric against the number of places by which all positions are shifted, a line an encoding.

    Rows: ``shifted_positions`` with encoding.
    """
    rows = some(rows, "shifted positions")
    panels = {"loss": "loss, nats a token", beside: beside.replace("_", " ")}
    figure = make_subplots(cols=2, subplot_titles=list(panels.values()), horizontal_spacing=0.09)
    encodings = list(dict.fromkeys(rows["encoding"]))
    for i, encoding in enumerate(encodings):
        for column, metric in enumerate(panels, start=1):
            line = rows[(rows["encoding"] == encoding) & (rows["metric"] == metric)].sort_values("shift")
            figure.add_scatter(
                # 0 has no place on a logarithmic axis; encodings that do not move lie on each other.
                x=[(k or 0.5) * 1.03 ** (i - len(encodings) / 2) for k in line["shift"].astype(int)],
                y=line["value"].tolist(),
                row=1,
                col=column,
                name=plain(encoding),
                legendgroup=encoding,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": colour(encoding)},
                error_y=interval_bars(line),
                customdata=line["shift"].astype(int).tolist(),
                hovertemplate="shifted by %{customdata}: %{y:.3f}<extra>" + plain(encoding) + "</extra>",
            )
    shifts = sorted(set(rows["shift"].astype(int)))
    ticks = {"tickvals": [k or 0.5 for k in shifts], "ticktext": [str(k) for k in shifts]}
    figure.update_xaxes(title="positions shifted by", type="log", **ticks)
    figure.update_yaxes(rangemode="tozero")
    return figure.update_layout(**LAYOUT, height=380)


def probe_by_site(rows: pd.DataFrame, metric: str) -> go.Figure:
    """A probe's score by site, one panel an encoding, the model beside its three controls, bootstrap intervals.

    Rows: encoding, site, control, metric, value, low, high.
    """
    rows = some(rows[rows["metric"] == metric], f"probe scores {metric!r}")
    encodings = list(dict.fromkeys(rows["encoding"]))
    figure = make_subplots(
        cols=len(encodings), shared_yaxes=True, subplot_titles=[plain(e) for e in encodings], horizontal_spacing=0.015
    )
    for column, encoding in enumerate(encodings, start=1):
        for control, line in rows[rows["encoding"] == encoding].groupby("control", sort=False):
            figure.add_scatter(
                x=[short_site(s) for s in line["site"]],
                y=line["value"].tolist(),
                row=1,
                col=column,
                name=CONTROL_LABELS.get(control, control),
                legendgroup=control,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": colour(encoding) if control == "none" else "#777777", "dash": DASHES.get(control)},
                error_y=interval_bars(line),
            )
    figure.update_xaxes(tickangle=-35)
    figure.update_yaxes(title=metric.replace("_", " "), col=1)
    return figure.update_layout(**LAYOUT, height=430, legend={"orientation": "h", "y": -0.35})


def interval_bars(line: pd.DataFrame, width: int = 2, thickness: float = 1) -> dict:
    """Error bars from value, low and high."""
    return {
        "type": "data",
        "symmetric": False,
        "thickness": thickness,
        "width": width,
        "array": (line["high"] - line["value"]).tolist(),
        "arrayminus": (line["value"] - line["low"]).tolist(),
    }


def interval(value: float, low: float, high: float) -> str:
    """``0.117 [0.114, 0.120]``"""
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def short_site(site: str) -> str:
    """``blocks.0.hook_resid_post`` -> ``0.resid_post``."""
    return site.removeprefix("blocks.").replace("hook_", "")


def matrix(part: pd.DataFrame, value: str) -> np.ndarray:
    matrix = part.pivot(index="query", columns="key", values=value).to_numpy(
        dtype=np.float32
    )  # all that an eye can see
    return np.where(np.tri(*matrix.shape, dtype=bool), matrix, np.nan)  # the future is left blank


def plain(text: object) -> str:
    """Text as plotly should show it: it reads some HTML in titles and labels, and names come from outside."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def some(rows: pd.DataFrame, what: str) -> pd.DataFrame:
    if rows.empty:
        raise ProbeError(f"a figure of {what} wants at least one row, got none")
    return rows
