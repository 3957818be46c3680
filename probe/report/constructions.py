"""Figures of hand-built weights, and of what training finds in their place. Rows in, ``go.Figure`` out."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probe.report.drawing import matrix, plain, short_site, some
from probe.report.style import (
    ATTENTION_SCALE,
    BLUE,
    DIVERGING,
    GREY,
    OTHER_COLOURS,
    STRONG,
    colour_bar,
    finish,
    nth_look,
    panel,
    panels,
    title_lowest,
)

MOST_HEADS = 5


def plot_construction_errors(rows: pd.DataFrame) -> go.Figure:
    """Each claim's largest error as a share of its tolerance, a point a check: left of 1 it holds.

    Rows: construction, quantity, length, dtype, largest_error, tolerance. Exact results (error 0) and what is
    smaller stand at 1e-12; an error where none is allowed stands at 1e3.
    """
    rows = some(rows, "constructions")
    figure = panel(30 + 24 * rows["construction"].nunique())
    for i, (dtype, part) in enumerate(rows.groupby("dtype", sort=False)):
        share = [
            float(np.clip(r.largest_error / r.tolerance if r.tolerance else np.inf * r.largest_error, 1e-12, 1e3))
            if r.largest_error > 0
            else 1e-12
            for r in part.itertuples()
        ]
        figure.add_scatter(
            x=share, y=part["construction"].map(plain).tolist(), mode="markers",
            name=f"{plain(dtype)} (n = {len(part)} checks)",
            marker={"color": nth_look(i).colour, "size": 8, "opacity": 0.6, "symbol": nth_look(i).symbol},
            text=[
                f"{plain(r.quantity)}, length {r.length}: error {r.largest_error:.3g}, tolerance {r.tolerance:.3g}"
                for r in part.itertuples()
            ],
            hovertemplate="%{text}<extra>" + plain(dtype) + "</extra>",
        )  # fmt: skip
    figure.add_vline(x=1, line_width=1.5, line_dash="dot", line_color=GREY)
    figure.update_xaxes(type="log", title="largest error / tolerance (left of 1 it holds)", exponentformat="power")
    figure.update_yaxes(autorange="reversed")
    return finish(figure, showlegend=True)


def plot_construction_portrait(attention: pd.DataFrame, stream: pd.DataFrame, errors: pd.DataFrame) -> go.Figure:
    """What a construction does: the attention of its last heads (up to five), what the stream's position row holds at
    each site against the position, and the error by position.

    Rows: ``attention`` layer, head, query, key, weight; ``stream`` t, site, value; ``errors`` t, quantity, error. The
    axes of the stream and of the error are logarithmic; values and errors of 0 are left out.
    """
    heads = list(some(attention, "a construction").groupby(["layer", "head"]))[-MOST_HEADS:]
    stream, errors = stream[stream["value"] > 0], errors[errors["error"] > 0]
    lines = {"position row of the stream": _stream_lines(stream), "error by position": _error_marks(errors)}
    below = {title: traces for title, traces in lines.items() if traces}
    figure, places = _portrait_panels([f"layer {layer}, head {head}" for (layer, head), _ in heads], list(below))
    for place, (_, part) in zip(places, heads, strict=False):
        figure.add_heatmap(
            z=matrix(part, "weight"), coloraxis="coloraxis", hoverongaps=False,
            hovertemplate="query %{y}, key %{x}: %{z:.3g}<extra></extra>", **place,
        )  # fmt: skip
        figure.update_xaxes(title="key position", **place)
        figure.update_yaxes(autorange="reversed", showticklabels=place == places[0], **place)
    figure.update_yaxes(title="query position", **places[0])
    for place, (title, traces) in zip(places[len(heads) :], below.items(), strict=True):
        for trace in traces:
            figure.add_trace(trace, **place)
        figure.update_xaxes(type="log", title="position t, 1 at &lt;bos&gt;", **place)
        kind = "value" if title.startswith("position") else "error"
        figure.update_yaxes(type="log", exponentformat="power", title=kind, **place)
    if errors.empty:
        figure.layout.annotations[-1].text += " (every error is 0)"
    bar = colour_bar("attention", figure, share=0.4 if figure.layout.meta["drawn"] > 300 else 1)
    axis = {"colorscale": ATTENTION_SCALE, "cmin": 0, "cmax": 1, "colorbar": bar}
    return finish(figure, coloraxis=axis, showlegend=bool(below))


def _portrait_panels(heads: list[str], below: list[str]) -> tuple[go.Figure, list[dict[str, int]]]:
    """Heads beside each other, and below them at most two panels that share the width; beside a single head."""
    if len(heads) == 1:
        return panels([[*heads, *below]], height=250, beside=0.09, shared_y=False)
    columns = len(heads)
    left = columns // max(len(below), 1)
    widths = (left, columns - left) if len(below) == 2 else (columns,)
    spans = [spec for width in widths for spec in ({"colspan": width}, *[None] * (width - 1))]
    figure = make_subplots(
        rows=2 if below else 1, cols=columns, specs=[[{}] * columns, spans] if below else [[{}] * columns],
        subplot_titles=[*heads, *below], vertical_spacing=0.21 if below else 0, horizontal_spacing=0.26 / columns,
    )  # fmt: skip
    figure.update_annotations(font_size=12)
    figure.layout.meta = {"drawn": 480 if below else 230}
    places = [{"row": 1, "col": column + 1} for column in range(columns)]
    return figure, [*places, *({"row": 2, "col": 1 + left * i} for i in range(len(below)))]


def _stream_lines(stream: pd.DataFrame) -> list[go.Scatter]:
    return [
        go.Scatter(
            x=part["t"].tolist(), y=part["value"].tolist(), name=plain(short_site(site)), mode="lines",
            line={"color": nth_look(i).colour, "dash": ("solid", "dash", "dot")[i // len(OTHER_COLOURS) % 3]},
        )
        for i, (site, part) in enumerate(stream.groupby("site", sort=False))
    ]  # fmt: skip


def _error_marks(errors: pd.DataFrame) -> list[go.Scatter]:
    return [
        go.Scatter(
            x=part["t"].tolist(), y=part["error"].tolist(), name=f"error: {plain(quantity)}", mode="markers",
            marker={"color": nth_look(i).colour, "size": 4, "symbol": nth_look(i).symbol},
        )
        for i, (quantity, part) in enumerate(errors.groupby("quantity", sort=False))
    ]  # fmt: skip


def plot_construction_matrices(rows: pd.DataFrame) -> go.Figure:
    """The weights of a construction, a panel a matrix, colours by the sign and the logarithm of the size.

    Rows: layer, matrix, n_rows, n_columns, row, column, weight; entries that are not there are 0 and left blank.
    """
    found = list(some(rows, "matrices").groupby(["layer", "matrix"], sort=False))
    titles = [f"layer {layer}: {plain(name)}" for (layer, name), _ in found]
    figure, places = panels([titles], height=200, most=4, gap=72, beside=0.05, shared_y=False)
    figure.update_annotations(font_size=12)
    size = np.log10(rows["weight"].abs())
    lowest, reach = size.min(), max(float(size.max() - size.min()), 1.0)
    for place, (_, part) in zip(places, found, strict=True):
        where = part["row"].to_numpy(), part["column"].to_numpy()
        shape = tuple(part[["n_rows", "n_columns"]].iloc[0])
        weight, shade = np.full(shape, np.nan), np.full(shape, np.nan)
        weight[where] = part["weight"]
        shade[where] = np.sign(part["weight"]) * (0.15 + 0.85 * (np.log10(part["weight"].abs()) - lowest) / reach)
        figure.add_heatmap(
            z=shade, customdata=weight, coloraxis="coloraxis", hoverongaps=False,
            hovertemplate="row %{y}, column %{x}: %{customdata:.4g}<extra></extra>", **place,
        )  # fmt: skip
        figure.update_yaxes(autorange="reversed", **place)
    figure.update_yaxes(title="row", col=1)
    title_lowest(figure, places, "column")
    ends = {"tickvals": [-1, -0.15, 0.15, 1], "ticktext": [f"−{_power(size.max())}", f"−{_power(lowest)}",
                                                           _power(lowest), _power(size.max())]}  # fmt: skip
    bar = colour_bar("weight", figure) | ends
    return finish(figure, coloraxis=DIVERGING | {"cmin": -1, "cmax": 1, "colorbar": bar})


def _power(exponent: float) -> str:
    return f"{10.0**exponent:.2g}"


def plot_learned_heads(rows: pd.DataFrame) -> go.Figure:
    """The heads of layer 0 before and after training: slope of the log-odds of the first token's attention against
    ln(t - 1), and the score c that it has above the others.

    A head that sees only which token is ``<bos>`` has the slope -1, whatever its c; the construction has c = 0.
    Rows: those of ``constructions.learnability`` (run, bos, layer, head, start, stage, metric, value).
    """
    heads = rows[rows["metric"].isin(["slope", "c"]) & (rows["start"] == "random") & (rows["layer"] == 0)]
    keys = ["bos", "stage", "run", "head"]
    points = some(heads, "learned heads").pivot_table(index=keys, columns="metric", values="value").reset_index()
    figure = panel(330)
    for (bos, stage), part in points.groupby(["bos", "stage"], sort=False):
        figure.add_scatter(
            x=part["slope"].tolist(), y=part["c"].tolist(), mode="markers",
            name=f"{'with' if bos else 'without'} &lt;bos&gt;, {plain(stage)} (n = {len(part)} heads)",
            marker={
                "color": BLUE if bos else STRONG, "symbol": "circle" if stage == "trained" else "circle-open",
                "size": 8, "opacity": 0.7,
            },
        )  # fmt: skip
    figure.add_vline(x=-1, line_width=1.5, line_dash="dot", line_color=GREY)
    figure.update_xaxes(title="slope of ln(mass / (1 - mass)) against ln(t - 1)")
    figure.update_yaxes(title="c, nats")
    return finish(figure)
