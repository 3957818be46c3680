"""Figures of hand-built weights, and of what training finds in their place. Rows in, ``go.Figure`` out."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probe.report.figures import ATTENTION_SCALE, COLOURS, LAYOUT, OTHER_COLOURS, matrix, plain, short_site, some


def construction_errors(rows: pd.DataFrame) -> go.Figure:
    """Each claim's largest error as a share of its tolerance, a point a check: left of 1 it holds.

    Rows: construction, quantity, length, dtype, largest_error, tolerance. Exact results (error 0) and what is
    smaller stand at 1e-12; an error where none is allowed stands at 1e3.
    """
    rows = some(rows, "constructions")
    figure = go.Figure()
    for i, (dtype, part) in enumerate(rows.groupby("dtype", sort=False)):
        share = [
            float(np.clip(r.largest_error / r.tolerance if r.tolerance else np.inf * r.largest_error, 1e-12, 1e3))
            if r.largest_error > 0
            else 1e-12
            for r in part.itertuples()
        ]
        figure.add_scatter(
            x=share,
            y=part["construction"].map(plain).tolist(),
            mode="markers",
            name=plain(dtype),
            marker={"color": OTHER_COLOURS[i % len(OTHER_COLOURS)], "size": 8, "opacity": 0.6, "symbol": i},
            text=[
                f"{plain(r.quantity)}, length {r.length}: error {r.largest_error:.3g}, tolerance {r.tolerance:.3g}"
                for r in part.itertuples()
            ],
            hovertemplate="%{text}<extra>" + plain(dtype) + "</extra>",
        )
    figure.add_vline(x=1, line_width=1.5, line_dash="dot", opacity=0.8, line_color="#666666")
    figure.update_xaxes(type="log", title="largest error / tolerance", exponentformat="power")
    figure.update_yaxes(autorange="reversed")
    n = rows["construction"].nunique()
    return figure.update_layout(
        **LAYOUT, height=170 + 24 * n, legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"}
    )


def construction_portrait(attention: pd.DataFrame, stream: pd.DataFrame, errors: pd.DataFrame) -> go.Figure:
    """What a construction does: the attention of its last heads (up to five), what the stream's position row holds at
    each site against the position, and the error by position.

    Rows: ``attention`` layer, head, query, key, weight; ``stream`` t, site, value; ``errors`` t, quantity, error. The
    axes of the stream and of the error are logarithmic; values and errors of 0 are left out.
    """
    heads = list(some(attention, "a construction").groupby(["layer", "head"]))[-5:]
    stream, errors = stream[stream["value"] > 0], errors[errors["error"] > 0]
    columns = max(2, len(heads))
    titles = [f"layer {layer}, head {head}" for (layer, head), _ in heads] + [""] * (columns - len(heads))
    titles += ["position row of the stream" if len(stream) else "", "error" if len(errors) else "every error is 0"]
    left = columns // 2
    lower = [{"colspan": left}, *[None] * (left - 1), {"colspan": columns - left}, *[None] * (columns - left - 1)]
    figure = make_subplots(
        rows=2, cols=columns, specs=[[{}] * columns, lower], subplot_titles=titles, vertical_spacing=0.18
    )
    for column, (_, part) in enumerate(heads, start=1):
        figure.add_heatmap(
            z=matrix(part, "weight"),
            coloraxis="coloraxis",
            row=1,
            col=column,
            hovertemplate="query %{y}, key %{x}: %{z:.3g}<extra></extra>",
        )
        figure.update_yaxes(autorange="reversed", row=1, col=column)
    for i, (site, part) in enumerate(stream.groupby("site", sort=False)):
        figure.add_scatter(
            x=part["t"].tolist(),
            y=part["value"].tolist(),
            name=short_site(site),
            mode="lines",
            line={"color": [*COLOURS.values(), *OTHER_COLOURS][i % 12]},
            row=2,
            col=1,
        )
    for i, (quantity, part) in enumerate(errors.groupby("quantity", sort=False)):
        figure.add_scatter(
            x=part["t"].tolist(),
            y=part["error"].tolist(),
            name=f"error: {plain(quantity)}",
            mode="markers",
            marker={"color": OTHER_COLOURS[i % len(OTHER_COLOURS)], "size": 4},
            row=2,
            col=left + 1,
        )
    figure.update_xaxes(type="log", title="position t, 1 at &lt;bos&gt;", row=2)
    figure.update_yaxes(type="log", exponentformat="power", row=2)
    scale = {
        "colorscale": ATTENTION_SCALE,
        "cmin": 0,
        "cmax": 1,
        "colorbar": {"title": "attention", "len": 0.45, "y": 0.8},
    }
    return figure.update_layout(**LAYOUT, height=640, coloraxis=scale, legend={"orientation": "h", "y": -0.12})


def construction_matrices(rows: pd.DataFrame) -> go.Figure:
    """The weights of a construction, a panel a matrix, colours by the sign and the logarithm of the size.

    Rows: layer, matrix, n_rows, n_columns, row, column, weight; entries that are not there are 0 and left blank.
    """
    panels = list(some(rows, "matrices").groupby(["layer", "matrix"], sort=False))
    columns = min(4, len(panels))
    titles = [f"layer {layer}: {plain(name)}" for (layer, name), _ in panels]
    n_rows = -(-len(panels) // columns)
    figure = make_subplots(rows=n_rows, cols=columns, subplot_titles=titles, vertical_spacing=min(0.12, 0.4 / n_rows))
    size = np.log10(rows["weight"].abs())
    lowest, reach = size.min(), max(float(size.max() - size.min()), 1.0)
    for i, (_, part) in enumerate(panels):
        where = part["row"].to_numpy(), part["column"].to_numpy()
        shape = tuple(part[["n_rows", "n_columns"]].iloc[0])
        weight, shade = np.full(shape, np.nan), np.full(shape, np.nan)
        weight[where] = part["weight"]
        shade[where] = np.sign(part["weight"]) * (0.15 + 0.85 * (np.log10(part["weight"].abs()) - lowest) / reach)
        figure.add_heatmap(
            z=shade,
            customdata=weight,
            coloraxis="coloraxis",
            row=i // columns + 1,
            col=i % columns + 1,
            hovertemplate="row %{y}, column %{x}: %{customdata:.4g}<extra></extra>",
        )
        figure.update_yaxes(autorange="reversed", row=i // columns + 1, col=i % columns + 1)
    scale = {"colorscale": "RdBu", "reversescale": True, "cmin": -1, "cmax": 1, "showscale": False}
    return figure.update_layout(**LAYOUT, height=80 + 260 * n_rows, coloraxis=scale)


def learned_heads(rows: pd.DataFrame) -> go.Figure:
    """The heads of layer 0 before and after training: slope of the log-odds of the first token's attention against
    ln(t - 1), and the score c that it has above the others.

    A head that sees only which token is ``<bos>`` has the slope -1, whatever its c; the construction has c = 0.
    Rows: those of ``constructions.learnability`` (run, bos, layer, head, start, stage, metric, value).
    """
    heads = rows[rows["metric"].isin(["slope", "c"]) & (rows["start"] == "random") & (rows["layer"] == 0)]
    keys = ["bos", "stage", "run", "head"]
    points = some(heads, "learned heads").pivot_table(index=keys, columns="metric", values="value").reset_index()
    figure = go.Figure()
    for (bos, stage), part in points.groupby(["bos", "stage"], sort=False):
        trained = stage == "trained"
        figure.add_scatter(
            x=part["slope"].tolist(),
            y=part["c"].tolist(),
            mode="markers",
            name=f"{'with' if bos else 'without'} &lt;bos&gt;, {stage} (n = {len(part)})",
            marker={
                "color": COLOURS["t5"] if bos else COLOURS["alibi"],
                "symbol": "circle" if trained else "circle-open",
                "size": 8,
                "opacity": 0.7,
            },
        )
    figure.add_vline(x=-1, line_width=1.5, line_dash="dot", line_color="#666666", opacity=0.8)
    figure.update_xaxes(title="slope of ln(mass / (1 - mass)) against ln(t - 1)")
    figure.update_yaxes(title="c, nats")
    return figure.update_layout(**LAYOUT, height=450)
