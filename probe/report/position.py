"""Figures of position in hidden states: whether a model misses it when it is taken out."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probe.report.figures import LAYOUT, colour, plain, short_site, some

CONCEPTS = {"position": "circle", "classes": "square"}


def erasure_losses(rows: pd.DataFrame, metric: str = "loss") -> go.Figure:
    """The change of the loss (or of another metric) when position is erased at a site, a panel an encoding, beside
    random subspaces of the same rank in grey, with intervals.

    Rows: those of ``erase_position`` with encoding.
    """
    rows = some(rows[(rows["metric"] == metric) & rows["length"].isna()], f"erased positions, metric {metric!r}")
    encodings = list(dict.fromkeys(rows["encoding"]))
    figure = make_subplots(
        cols=len(encodings), shared_yaxes=True, subplot_titles=[plain(e) for e in encodings], horizontal_spacing=0.015
    )
    for column, encoding in enumerate(encodings, start=1):
        of = rows[rows["encoding"] == encoding]
        for (concept, control), line in of.groupby(["concept", "control"], sort=False):
            erased = control == "none"
            what = f"{concept} erased" if erased else f"random, rank of {concept}"
            figure.add_scatter(
                x=[short_site(s) for s in line["site"]],
                y=line["value"].tolist(),
                name=what,
                legendgroup=what,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": colour(encoding) if erased else "#999999", "dash": "solid" if erased else "dot"},
                marker={"symbol": CONCEPTS.get(concept, "diamond"), "size": 8},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "thickness": 1,
                    "width": 3,
                    "array": (line["high"] - line["value"]).tolist(),
                    "arrayminus": (line["value"] - line["low"]).tolist(),
                },
                text=[f"rank {int(r)}" for r in line["rank"]],
                hovertemplate="%{x}: %{y:.3f} (%{text})<extra>" + plain(what) + "</extra>",
                row=1,
                col=column,
            )
    figure.update_xaxes(tickangle=-35)
    figure.update_yaxes(title=f"change of {plain(metric.replace('_', ' '))}", col=1)
    return figure.update_layout(**LAYOUT, height=430, legend={"orientation": "h", "y": -0.35})
