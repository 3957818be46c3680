"""Figures of a table of positions: how alike positions are, its principal components, its norms."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probe.report.figures import CONTROL_LABELS, LAYOUT, plain, some

SHADES = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
GREY = "#999999"


def table_map(similarity: pd.DataFrame, basis: pd.DataFrame) -> go.Figure:
    """Cosine similarity of every two positions beside the table along its principal components.

    Rows: those of ``position_table``'s ``similarity`` and ``basis``.
    """
    similarity = some(similarity, "a map of positions")
    square = similarity.pivot(index="position", columns="other", values="value")
    titles = ["principal components", "cosine of two positions"]
    figure = make_subplots(cols=2, subplot_titles=titles, horizontal_spacing=0.12)
    figure.add_heatmap(
        z=square.to_numpy(), x=square.columns.tolist(), y=square.index.tolist(), row=1, col=2, zmin=-1, zmax=1,
        colorscale="RdBu", reversescale=True, colorbar={"title": "cosine", "thickness": 14},
        hovertemplate="positions %{y} and %{x}: %{z:.3f}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(title="position", autorange="reversed", row=1, col=2)
    for component, line in basis[basis["control"] == "none"].groupby("component"):
        name = f"{int(component) + 1}: {line['share'].iloc[0]:.0%} of the variance"
        figure.add_scatter(
            x=line["position"].tolist(), y=line["value"].tolist(), mode="lines", name=name, row=1, col=1,
            line={"color": SHADES[int(component) % len(SHADES)]},
            hovertemplate="position %{x}: %{y:.3f}<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(title="position")
    figure.update_yaxes(title="coordinate", row=1, col=1)
    return figure.update_layout(**LAYOUT, height=430, legend={"orientation": "h", "y": -0.2})


def table_curves(rows: pd.DataFrame) -> go.Figure:
    """Norm by position, and similarity by lag beside its controls.

    Rows: those of ``position_table``'s ``rows``.
    """
    rows = some(rows, "a table of positions")
    titles = ["norm of a position's vector", "mean cosine of positions k apart"]
    figure = make_subplots(cols=2, subplot_titles=titles, horizontal_spacing=0.12)
    strokes = {"none": "#000000", "untrained": GREY, "shuffled": "#0072B2"}
    for column, (metric, along) in enumerate((("norm", "position"), ("similarity", "lag")), start=1):
        for control, line in rows[rows["metric"] == metric].groupby("control", sort=False):
            name = plain(CONTROL_LABELS.get(control, control))
            if line["low"].notna().all():
                x = line[along].astype(int).tolist()
                figure.add_scatter(
                    x=x + x[::-1], y=[*line["high"], *line["low"][::-1]], fill="toself", mode="none", opacity=0.2,
                    fillcolor=strokes.get(control, GREY), hoverinfo="skip", showlegend=False, legendgroup=control,
                    row=1, col=column,
                )  # fmt: skip
            figure.add_scatter(
                x=line[along].astype(int).tolist(), y=line["value"].tolist(), mode="lines", name=name, row=1,
                col=column, legendgroup=control, showlegend=column == 2, line={"color": strokes.get(control, GREY)},
                hovertemplate="%{x}: %{y:.3f}<extra>" + name + "</extra>",
            )  # fmt: skip
    figure.update_xaxes(title="position", row=1, col=1)
    figure.update_xaxes(title="k, tokens", row=1, col=2)
    figure.update_yaxes(title="norm", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="cosine", row=1, col=2)
    return figure.update_layout(**LAYOUT, height=360, legend={"orientation": "h", "y": -0.25})
