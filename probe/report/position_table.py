"""Figures of a table of positions: how alike positions are, its principal components, its norms."""

import pandas as pd
import plotly.graph_objects as go

from probe.report.drawing import add_band, plain, some
from probe.report.style import BLUE, CONTROL_LABELS, DIVERGING, GREY, colour_bar, finish, nth_look, panels

CONTROL_COLOURS = {"none": "#000000", "untrained": GREY, "shuffled": BLUE}


def plot_table_map(similarity: pd.DataFrame, basis: pd.DataFrame) -> go.Figure:
    """Cosine similarity of every two positions beside the table along its principal components.

    Rows: those of ``position_table``'s ``similarity`` and ``basis``. Where one of the two is empty, its panel is.
    """
    some(basis if similarity.empty else similarity, "a map of positions")
    columns = ["position", "other", "value", "control", "component", "share"]
    similarity, basis = (rows.reindex(columns=columns) for rows in (similarity, basis))
    square = similarity.pivot(index="position", columns="other", values="value")
    titles = ["principal components", "cosine of two positions"]
    figure, (left, right) = panels([titles], height=310, shared_y=False, beside=0.12)
    figure.add_heatmap(
        z=square.to_numpy(), x=square.columns.tolist(), y=square.index.tolist(), zmin=-1, zmax=1,
        colorbar=colour_bar("cosine", figure), hovertemplate="positions %{y} and %{x}: %{z:.3f}<extra></extra>",
        **DIVERGING, **right,
    )  # fmt: skip
    figure.update_yaxes(title="position", autorange="reversed", **right)
    for component, line in basis[basis["control"] == "none"].groupby("component"):
        name = f"{int(component) + 1}: {line['share'].iloc[0]:.0%} of the variance"
        figure.add_scatter(
            x=line["position"].tolist(), y=line["value"].tolist(), mode="lines", name=name,
            line={"color": nth_look(int(component)).colour},
            hovertemplate="position %{x}: %{y:.3f}<extra>" + name + "</extra>", **left,
        )  # fmt: skip
    figure.update_xaxes(title="position")
    figure.update_yaxes(title="coordinate", **left)
    return finish(figure)


def plot_table_curves(rows: pd.DataFrame) -> go.Figure:
    """Norm by position, and similarity by lag beside its controls.

    Rows: those of ``position_table``'s ``rows``.
    """
    rows = some(rows, "a table of positions")
    titles = ["norm of a position's vector", "mean cosine of positions k apart"]
    figure, places = panels([titles], height=250, shared_y=False, beside=0.12)
    along = (("norm", "position"), ("similarity", "lag"))
    for place, (metric, at) in zip(places, along, strict=True):
        for control, line in rows[rows["metric"] == metric].groupby("control", sort=False):
            name, stroke = plain(CONTROL_LABELS.get(control, control)), CONTROL_COLOURS.get(control, GREY)
            x = line[at].astype(int).tolist()
            add_band(figure, x, line, stroke, control, **place)
            figure.add_scatter(
                x=x, y=line["value"].tolist(), mode="lines", name=name, legendgroup=control,
                showlegend=metric == "similarity", line={"color": stroke},
                hovertemplate="%{x}: %{y:.3f}<extra>" + name + "</extra>", **place,
            )  # fmt: skip
    left, right = places
    figure.update_xaxes(title="position", **left)
    figure.update_xaxes(title="k, tokens", **right)
    figure.update_yaxes(title="norm", rangemode="tozero", **left)
    figure.update_yaxes(title="cosine", **right)
    return finish(figure)
