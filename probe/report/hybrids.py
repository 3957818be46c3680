"""Figures of models in which some layers see position and others do not."""

import pandas as pd
import plotly.graph_objects as go

from probe.report.drawing import counted, interval, plain, some
from probe.report.style import CONTROL_LABELS, GREY, PALE, finish, look, panels, title_lowest

LABELS = {
    "on_keys": "attention on the key",
    "on_first": "attention on the first token",
    "on_recent": "attention on the last tokens",
    "reach": "reach (1: as far as uniform attention)",
}


def plot_attention_by_kind(rows: pd.DataFrame, metric: str) -> go.Figure:
    """One number of every head by its layer, coloured by the encoding that the layer sees; untrained heads in grey.

    Rows: ``attention_on`` with model (the model's name) and control.
    """
    rows = some(rows[rows["metric"] == metric], f"attention by head ({metric})")
    names = list(dict.fromkeys(rows["model"]))
    figure, places = panels([[plain(n) for n in names]], height=270, most=4, beside=0.02)
    shown = set()
    for place, name in zip(places, names, strict=True):
        for (control, kind), part in rows[rows["model"] == name].groupby(["control", "layer_encoding"], sort=False):
            fresh = control != "none"
            sees = "layers without positions" if kind == "none" else f"layers with {kind} positions"
            label = plain(CONTROL_LABELS.get(control, control) if fresh else sees)
            figure.add_scatter(
                x=(part["layer"].astype(float) + (0.25 if fresh else 0)).tolist(), y=part["value"].tolist(),
                mode="markers", name=label, legendgroup=label, showlegend=label not in shown, **place,
                marker={
                    "color": PALE if fresh else look(kind).colour, "size": 5 if fresh else 8, "opacity": 0.7,
                    "symbol": "line-ew-open" if fresh else look(kind).symbol,
                },
                text=[f"layer {r.layer}, head {r.head}: {interval(r.value, r.low, r.high)}" for r in part.itertuples()],
                hovertemplate="%{text}<extra>" + label + "</extra>",
            )  # fmt: skip
            shown.add(label)
    if metric == "reach":
        figure.add_hline(y=1, line_width=1, line_dash="dot", line_color=GREY)
    figure.update_xaxes(dtick=1 if rows["layer"].max() < 16 else None)
    title_lowest(figure, places, "layer")
    figure.update_yaxes(title=plain(LABELS.get(metric, metric)) + counted(rows), rangemode="tozero", col=1)
    return finish(figure)
