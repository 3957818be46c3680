"""Rows -> figures. Every function takes tidy rows and returns a ``plotly.graph_objects.Figure``; none writes a file."""

from collections.abc import Sequence

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
DASHES = {"none": "solid", "untrained": "dash", "embedding": "dot", "shuffled": "dashdot"}
CONTROL_LABELS = {
    "none": "trained model",
    "untrained": "untrained model",
    "embedding": "token embedding alone",
    "shuffled": "shuffled positions",
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
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "thickness": 1,
                    "width": 2,
                    "array": (line["high"] - line["value"]).tolist(),
                    "arrayminus": (line["value"] - line["low"]).tolist(),
                },
            )
    figure.update_xaxes(tickangle=-35)
    figure.update_yaxes(title=metric.replace("_", " "), col=1)
    return figure.update_layout(**LAYOUT, height=430, legend={"orientation": "h", "y": -0.35})


def attention_maps(rows: pd.DataFrame, labels: Sequence[str] | None = None) -> go.Figure:
    """Each head's mean pattern, its template, and their difference, side by side.

    Rows: layer, head, template, query, key, pattern, template_pattern, distance (natural logarithm; one value a head).
    ``labels`` name the positions where all sequences hold the same tokens.
    """
    rows = some(rows, "attention maps")
    heads = list(rows.groupby(["layer", "head"], sort=True))
    titles = []
    for (layer, head), part in heads:
        first = part.iloc[0]
        titles += [
            f"layer {layer}, head {head}",
            f"{plain(first['template'])} ({first['distance']:.3f})",
            "difference",
        ]
    figure = make_subplots(
        rows=len(heads),
        cols=3,
        subplot_titles=titles,
        horizontal_spacing=0.04,
        vertical_spacing=min(0.11, 0.33 / len(heads)),
    )
    for row, (_, part) in enumerate(heads, start=1):
        pattern, template = matrix(part, "pattern"), matrix(part, "template_pattern")
        for column, (z, axis) in enumerate(
            [(pattern, "coloraxis"), (template, "coloraxis"), (pattern - template, "coloraxis2")], start=1
        ):
            figure.add_heatmap(
                z=z,
                x=labels,
                y=labels,
                coloraxis=axis,
                row=row,
                col=column,
                hovertemplate="query %{y}, key %{x}: %{z:.3f}<extra></extra>",
            )
            figure.update_yaxes(autorange="reversed", row=row, col=column)
        figure.update_yaxes(title="query", row=row, col=1)
    for column in (1, 2, 3):
        figure.update_xaxes(title="key", row=len(heads), col=column)
    largest = float((rows["pattern"] - rows["template_pattern"]).abs().max()) or 1.0
    return figure.update_layout(
        **LAYOUT,
        height=90 + 275 * len(heads),
        coloraxis={
            "colorscale": ATTENTION_SCALE,
            "cmin": 0,
            "cmax": 1,
            "colorbar": {"title": "attention", "len": 0.45, "y": 0.78},
        },
        coloraxis2={
            "colorscale": "RdBu",
            "reversescale": True,
            "cmin": -largest,
            "cmax": largest,
            "colorbar": {"title": "difference", "len": 0.45, "y": 0.25},
        },
    )


def template_distances(rows: pd.DataFrame) -> go.Figure:
    """How far each head lies from each template: a point a head, a panel an encoding, untrained models in grey.

    Rows: encoding, control, layer, head, template, value, low, high.
    """
    rows = some(rows, "template distances")
    encodings = list(dict.fromkeys(rows["encoding"]))
    figure = make_subplots(
        cols=len(encodings),
        shared_yaxes=True,
        subplot_titles=[plain(e) for e in encodings],
        horizontal_spacing=0.015,
    )
    for column, encoding in enumerate(encodings, start=1):
        for control, part in rows[rows["encoding"] == encoding].groupby("control", sort=False):
            trained = control == "none"
            figure.add_scatter(
                x=part["value"].tolist(),
                y=part["template"].map(plain).tolist(),
                mode="markers",
                name=CONTROL_LABELS.get(control, control),
                legendgroup=control,
                showlegend=column == 1,
                row=1,
                col=column,
                marker={
                    "color": colour(encoding) if trained else "#999999",
                    "symbol": "circle" if trained else "line-ns-open",
                    "size": 7 if trained else 9,
                    "opacity": 0.6,
                },
                text=[
                    f"layer {r.layer}, head {r.head}: {r.value:.3f} [{r.low:.3f}, {r.high:.3f}]"
                    for r in part.itertuples()
                ],
                hovertemplate="%{text}<extra>" + plain(CONTROL_LABELS.get(control, control)) + "</extra>",
            )
    figure.update_xaxes(rangemode="tozero")
    return figure.update_layout(**LAYOUT, height=430, legend={"orientation": "h", "y": -0.15})


def distance_matrix(rows: pd.DataFrame) -> go.Figure:
    """The distance between every two models, with its interval; 0 on the diagonal by definition.

    Rows: model_a, model_b, value, low, high; each pair once, in either order.
    """
    rows = some(rows, "model distances")
    models = list(dict.fromkeys([*rows["model_a"], *rows["model_b"]]))
    z = pd.DataFrame(0.0, index=models, columns=models)
    text = pd.DataFrame("", index=models, columns=models)
    for r in rows.itertuples():
        for a, b in ((r.model_a, r.model_b), (r.model_b, r.model_a)):
            z.loc[a, b] = r.value
            text.loc[a, b] = f"{r.value:.3f}<br>[{r.low:.3f}, {r.high:.3f}]"
    names = [plain(m) for m in models]
    figure = go.Figure(
        go.Heatmap(
            z=z.to_numpy(),
            x=names,
            y=names,
            text=text.to_numpy(),
            texttemplate="%{text}",
            colorscale="Blues",
            zmin=0,
            hovertemplate="%{y} and %{x}: %{text}<extra></extra>",
            colorbar={"title": "distance"},
        )
    )
    figure.update_yaxes(autorange="reversed")
    return figure.update_layout(**LAYOUT, height=110 + 75 * len(models))


def short_site(site: str) -> str:
    """``blocks.0.hook_resid_post`` -> ``0.resid_post``."""
    return site.removeprefix("blocks.").replace("hook_", "")


def matrix(part: pd.DataFrame, value: str) -> np.ndarray:
    matrix = part.pivot(index="query", columns="key", values=value).to_numpy(dtype=float)
    return np.where(np.tri(*matrix.shape, dtype=bool), matrix, np.nan)  # the future is left blank


def plain(text: object) -> str:
    """Text as plotly should show it: it reads some HTML in titles and labels, and names come from outside."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def some(rows: pd.DataFrame, what: str) -> pd.DataFrame:
    if rows.empty:
        raise ProbeError(f"a figure of {what} wants at least one row, got none")
    return rows
