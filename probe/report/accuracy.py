"""Figures of what models get right: by length, and with all positions shifted."""

import pandas as pd
import plotly.graph_objects as go

from probe.report.drawing import add_band, counted, interval_bars, plain, some
from probe.report.style import GREY, finish, look, panel, panels


def plot_accuracy_by_length(rows: pd.DataFrame, train_length: int | None = None) -> go.Figure:
    """Exact match against length, one line per model, Wilson intervals as bands.

    Rows: model, length, value, low, high, n (rows without a length are left out).
    """
    rows = some(rows[rows["length"].notna()], "exact match by length")
    figure = panel(300)
    for encoding, line in rows.groupby("model", sort=False):
        line = line.sort_values("length")
        x, seen = line["length"].astype(int).tolist(), look(encoding)
        add_band(figure, x, line, seen.colour, encoding)
        figure.add_scatter(
            x=x, y=line["value"].tolist(), name=plain(encoding), legendgroup=encoding, mode="lines+markers",
            line={"color": seen.colour}, marker={"symbol": seen.symbol, "size": 7}, customdata=line["n"].tolist(),
            hovertemplate="length %{x}: %{y:.3f} (n = %{customdata})<extra>" + plain(encoding) + "</extra>",
        )  # fmt: skip
    if train_length is not None:
        figure.add_vline(
            x=train_length + 0.5, line_width=1.5, line_dash="dot", line_color=GREY, annotation_text="longest trained",
            annotation_position="top", annotation_font_color=GREY,
        )  # fmt: skip
    figure.update_xaxes(title="length, tokens")
    figure.update_yaxes(title=f"exact match{counted(rows, 'a length')}", range=[-0.03, 1.05])
    return finish(figure)


def plot_under_shift(rows: pd.DataFrame, beside: str = "exact_match") -> go.Figure:
    """Loss and another metric against the number of places by which all positions are shifted, one line per model.

    Rows: ``shifted_positions`` with model.
    """
    rows = some(rows, "shifted positions")
    titles = {"loss": "loss, nats a token", beside: beside.replace("_", " ") + counted(rows)}
    figure, places = panels([["", ""]], height=290, shared_y=False, beside=0.09)
    encodings = list(dict.fromkeys(rows["model"]))
    for i, encoding in enumerate(encodings):
        seen = look(encoding)
        for place, metric in zip(places, titles, strict=True):
            line = rows[(rows["model"] == encoding) & (rows["metric"] == metric)].sort_values("shift")
            figure.add_scatter(
                # 0 has no place on a logarithmic axis; encodings that do not move lie on each other.
                x=[(k or 0.5) * 1.03 ** (i - len(encodings) / 2) for k in line["shift"].astype(int)],
                y=line["value"].tolist(), name=plain(encoding), legendgroup=encoding, showlegend=metric == "loss",
                mode="lines+markers", line={"color": seen.colour}, marker={"symbol": seen.symbol, "size": 7},
                error_y=interval_bars(line), customdata=line["shift"].astype(int).tolist(),
                hovertemplate="shifted by %{customdata}: %{y:.3f}<extra>" + plain(encoding) + "</extra>", **place,
            )  # fmt: skip
    shifts = sorted(set(rows["shift"].astype(int)))
    ticks = {"tickvals": [k or 0.5 for k in shifts], "ticktext": [str(k) for k in shifts]}
    figure.update_xaxes(title="positions shifted by, tokens", type="log", **ticks)
    figure.update_yaxes(rangemode="tozero")
    for place, title in zip(places, titles.values(), strict=True):
        figure.update_yaxes(title=title, **place)
    return finish(figure)
