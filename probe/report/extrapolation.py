"""Figures of what lies beyond the trained length: perplexity and passkeys.

Rows are long, with measurement, encoding, variant (a key of ``VARIANTS``, or any other name) and extension: the factor
by which the variant was made to reach beyond the trained length, NaN where it was made for none.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from probe.report.drawing import add_band, counted, interval, interval_bars, plain, some
from probe.report.style import BENEATH_TEXT, GREY, STRONG, colour_bar, finish, panels, title_lowest
from probe.report.tables import of
from probe.report.variants import (
    first_of,
    label,
    legend_line,
    made_for,
    mark_of,
    mark_trained,
    matched,
    multiple_of,
    ordered,
    position_ticks,
    stroke_of,
)


def plot_perplexity_by_context(rows: pd.DataFrame, train_length: int) -> go.Figure:
    """Perplexity against the context, one panel per model, a line a variant, each made for the shortest extension that
    reaches the context; thin lines are those made for other extensions. Bars are intervals over texts.

    Rows: measurement "perplexity", metric "perplexity", model, variant, extension, context, value, low, high, n,
    tokens.
    """
    rows = some(of(rows, "perplexity", metric="perplexity"), "perplexity by context")
    said = [f"{told(r.value, r.low, r.high)}, {r.n:.0f} texts, {r.tokens:.0f} tokens each" for r in rows.itertuples()]
    figure = _by_length(rows.assign(said=said), train_length, "context", "context, tokens")
    figure.update_yaxes(type="log", **_decades(rows["value"]))
    figure.update_yaxes(title=f"perplexity a token{counted(rows, 'texts')}", col=1)
    return finish(figure)


def plot_loss_by_position(rows: pd.DataFrame, train_length: int) -> go.Figure:
    """The loss of a token against its position, one panel per model, lines as in ``plot_perplexity_by_context``; bands
    are intervals over texts.

    Rows: measurement "loss_by_position", model, variant, extension, position (above 0), value, low, high.
    """
    rows = some(of(rows, "loss_by_position"), "loss by position")
    rows = some(rows[rows["position"] > 0], "loss by position")
    said = [interval(r.value, r.low, r.high) + " nats" for r in rows.itertuples()]
    figure = _by_length(rows.assign(said=said), train_length, "position", "position, tokens", bands=True)
    figure.update_yaxes(title=f"loss, nats a token{counted(rows, 'texts')}", col=1)
    return finish(figure)


def plot_passkey_by_length(rows: pd.DataFrame, train_length: int) -> go.Figure:
    """The share of keys that are said right against the length, all depths together, one panel per model, lines as in
    ``plot_perplexity_by_context``. Bars are Wilson intervals over prompts.

    Rows: measurement "passkey", metric "exact_match", depth missing, model, variant, extension, length, value, low,
    high, n.
    """
    rows = some(over_depths(rows), "passkeys by length")
    said = [f"{interval(r.value, r.low, r.high)}, {r.n:.0f} prompts" for r in rows.itertuples()]
    figure = _by_length(rows.assign(said=said), train_length, "length", "length, tokens")
    figure.update_yaxes(range=[-0.03, 1.05])
    figure.update_yaxes(title=f"exact match{counted(rows, 'prompts')}", col=1)
    return finish(figure)


def plot_passkey_map(rows: pd.DataFrame, train_length: int) -> go.Figure:
    """The share of keys that are said right, length × depth, a row of panels per model, a panel a variant, each made
    for the shortest extension that reaches the length. Right of the upright line lies what is beyond the trained one.

    Rows: measurement "passkey", metric "exact_match", model, variant, extension, length, depth, value, low, high, n.
    """
    rows = of(rows, "passkey", metric="exact_match")
    rows = some(rows[rows["depth"].notna()] if "depth" in rows else rows[:0], "passkeys by length and depth")
    rows = matched(rows, train_length, "length", "depth")
    rows["said"] = [
        f"{interval(r.value, r.low, r.high)}, {r.n:.0f} prompts{made_for(r.extension)}" for r in rows.itertuples()
    ]
    groups = [
        [(encoding, variant) for variant in ordered(part["variant"])]
        for encoding, part in rows.groupby("model", sort=False)
    ]
    titles = [[f"{plain(encoding)}<br>{label(variant)}" for encoding, variant in group] for group in groups]
    lengths, depths = sorted(set(rows["length"])), sorted(set(rows["depth"]))
    figure, places = panels(titles, most=5, height=60 + 24 * len(depths), gap=105)
    beyond = sum(n <= train_length for n in lengths) - 0.5
    for place, (encoding, variant) in zip(places, [pair for group in groups for pair in group], strict=True):
        part = rows[(rows["model"] == encoding) & (rows["variant"] == variant)]
        grid = {
            name: part.pivot(index="depth", columns="length", values=name).reindex(index=depths, columns=lengths)
            for name in ("value", "said")
        }
        figure.add_heatmap(
            z=grid["value"].to_numpy(dtype=float),
            x=[multiple_of(n, train_length) for n in lengths],
            y=[_depth(depth) for depth in depths],
            customdata=grid["said"].fillna("").to_numpy(),
            texttemplate="%{z:.2f}",
            textfont={"size": 11},
            hovertemplate="length %{x}, depth %{y}: %{customdata}<extra></extra>",
            hoverongaps=False,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            **place,
        )
        if -0.5 < beyond < len(lengths) - 0.5:
            figure.add_vline(x=beyond, line_width=3, line_color=STRONG, opacity=1, **place)
    figure.update_xaxes(type="category", tickangle=0, tickfont_size=11)
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_yaxes(title="depth", col=1)
    title_lowest(figure, places, "length, tokens")
    bar = colour_bar(f"exact<br>match<br>{counted(rows, '').strip()}", figure)
    return finish(figure, coloraxis={"colorscale": BENEATH_TEXT, "cmin": 0, "cmax": 1, "colorbar": bar})


def over_depths(rows: pd.DataFrame) -> pd.DataFrame:
    """Shares of keys said right, all depths together."""
    rows = of(rows, "passkey", metric="exact_match")
    return rows[rows["depth"].isna()] if "depth" in rows else rows


def told(value: float, low: float, high: float) -> str:
    """Numbers of any size and their interval, four digits of each: ``12.31 [12.04, 12.60]``."""
    return f"{_digits(value)} [{_digits(low)}, {_digits(high)}]"


def _digits(value: float) -> str:
    if not math.isfinite(value) or abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:.{max(0, 4 - len(str(int(abs(value)))))}f}"


def _depth(depth: float) -> str:
    return {0.0: "0 = start", 1.0: "1 = end"}.get(float(depth), f"{round(float(depth), 2):g}")


def _by_length(rows: pd.DataFrame, train_length: int, at: str, title: str, *, bands: bool = False) -> go.Figure:
    """Lines of value against ``at``, with what is ``said`` of each point on hovering."""
    rows = rows.reset_index(drop=True)
    encodings = list(dict.fromkeys(rows["model"]))
    figure, places = panels([[plain(e) for e in encodings]], most=3, height=330, gap=95)
    shown: set[str] = set()
    fitting = matched(rows, train_length, at).index
    for place, encoding in zip(places, encodings, strict=True):
        panel = rows[rows["model"] == encoding]
        there = ordered(panel["variant"])
        for i, variant in enumerate(there):
            part = panel[panel["variant"] == variant].sort_values(at)
            stroke = stroke_of(variant)
            # Bars of one length beside each other.
            dodge = 1.0 if bands else 1.012 ** (i - (len(there) - 1) / 2)
            for extension, line in part.groupby("extension"):
                if not line.index.isin(fitting).all():
                    figure.add_scatter(
                        x=(line[at] * dodge).tolist(), y=line["value"].tolist(), mode="lines", opacity=0.4,
                        line={"color": stroke, "width": 1}, name=f"{label(variant)}{made_for(extension)}",
                        legendgroup=variant, showlegend=False, customdata=_hover(line, at),
                        hovertemplate=f"%{{customdata}}<extra>{label(variant)}</extra>", **place,
                    )  # fmt: skip
            line = part[part.index.isin(fitting)]
            x = line[at].astype(float).tolist()
            if bands:
                add_band(figure, x, line, stroke, variant, **place)
            figure.add_scatter(
                x=[value * dodge for value in x] or [None],  # in the legend even where only thin lines are
                y=line["value"].tolist() or [None],
                mode="lines" if bands else "lines+markers",
                name=label(variant),
                legendgroup=variant,
                showlegend=first_of(variant, shown),
                line={"color": stroke, "width": 2},
                marker={"symbol": mark_of(variant), "size": 8},
                error_y=None if bands else interval_bars(line, width=3),
                customdata=_hover(line, at),
                hovertemplate=f"%{{customdata}}<extra>{label(variant)}</extra>",
                **place,
            )
    if len(fitting) < len(rows):
        legend_line(figure, "made for another length", {"color": GREY, "width": 1})
    mark_trained(figure, places, train_length)
    if at == "position":
        ticks = position_ticks(train_length, float(rows[at].max()), float(rows[at].min()))
    else:
        lengths = sorted(set(rows[at].astype(int)))
        ticks = {"tickvals": lengths, "ticktext": [multiple_of(n, train_length) for n in lengths]}
    figure.update_xaxes(type="log", tickangle=0, **ticks)
    title_lowest(figure, places, title)
    return figure


def _hover(line: pd.DataFrame, at: str) -> list[str]:
    return [
        f"{at} {length:g}: {said}{made_for(extension)}"
        for length, said, extension in zip(line[at], line["said"], line["extension"], strict=True)
    ]


def _decades(values: pd.Series) -> dict[str, Any]:
    """Ticks at 1, 2, 5, 10, … where plotly would name every digit."""
    values = values[np.isfinite(values.astype(float)) & (values > 0)]
    if values.empty or values.max() < 4 * values.min():
        return {}
    exponents = range(math.floor(math.log10(values.min())), math.ceil(math.log10(values.max())) + 1)
    ticks = [digit * 10.0**k for k in exponents for digit in ((1, 2, 5) if len(exponents) < 6 else (1,))]
    return {"tickvals": ticks, "ticktext": [f"{t:,.0f}" if 1 <= t < 1e6 else f"{t:.0e}" for t in ticks]}
