"""Figures of models in which some layers see position and others do not."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probe.report.figures import CONTROL_LABELS, LAYOUT, colour, interval, plain, some

LABELS = {
    "on_keys": "attention on the key",
    "on_first": "attention on the first token",
    "on_recent": "attention on the last tokens",
    "reach": "reach (1: as far as uniform attention)",
}


def attention_by_kind(rows: pd.DataFrame, metric: str) -> go.Figure:
    """One number of every head by its layer, coloured by the encoding that the layer sees; untrained heads in grey.

    Rows: ``attention_on`` with encoding (the model's name) and control.
    """
    rows = some(rows[rows["metric"] == metric], f"attention by head ({metric})")
    names = list(dict.fromkeys(rows["encoding"]))
    figure = make_subplots(cols=len(names), subplot_titles=[plain(n) for n in names], shared_yaxes=True)
    shown = set()
    for column, name in enumerate(names, start=1):
        for (control, kind), part in rows[rows["encoding"] == name].groupby(["control", "layer_encoding"], sort=False):
            fresh = control != "none"
            sees = "layers without positions" if kind == "none" else f"layers with {kind} positions"
            label = CONTROL_LABELS.get(control, control) if fresh else sees
            figure.add_scatter(
                x=(part["layer"].astype(float) + (0.25 if fresh else 0)).tolist(), y=part["value"].tolist(),
                mode="markers", name=plain(label), legendgroup=label, showlegend=label not in shown, row=1, col=column,
                marker={
                    "color": "#BBBBBB" if fresh else colour(kind), "size": 5 if fresh else 8, "opacity": 0.7,
                    "symbol": "line-ew-open" if fresh else "circle" if kind == "none" else "square",
                },
                text=[f"layer {r.layer}, head {r.head}: {interval(r.value, r.low, r.high)}" for r in part.itertuples()],
                hovertemplate="%{text}<extra>" + plain(label) + "</extra>",
            )  # fmt: skip
            shown.add(label)
    if metric == "reach":
        figure.add_hline(y=1, line_width=1, line_dash="dot", line_color="#999999")
    figure.update_xaxes(title="layer", dtick=1 if rows["layer"].max() < 16 else None)
    figure.update_yaxes(title=LABELS.get(metric, metric), rangemode="tozero", col=1)
    return figure.update_layout(**LAYOUT, height=400, legend={"orientation": "h", "y": -0.22})
