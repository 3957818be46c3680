"""Figures of attention: maps beside templates, distances, f_rel curves, entropy, and the census of heads."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probe.errors import ProbeError
from probe.report.figures import (
    ATTENTION_SCALE,
    CONTROL_LABELS,
    LAYOUT,
    colour,
    interval,
    interval_bars,
    matrix,
    plain,
    some,
)

SHORT_LABELS = {"previous_token": "prev.", "diagonal": "self", "induction": "induct."}
LOSSES = {
    "loss_without_content": ("by its template (content gone)", "#D55E00"),
    "loss_without_position": ("by itself with uniform for template (position gone)", "#0072B2"),
    "loss_uniform": ("by uniform attention (both gone)", "#999999"),
}
IMITATIONS = (
    ("f_rel_alibi", "ALiBi's nearest line", "#D55E00", "dash"),
    ("f_rel_t5", "T5's nearest bias", "#0072B2", "dot"),
)


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
        positions = np.unique(part["key"]).tolist() if labels is None else labels
        for column, (z, axis) in enumerate(
            [(pattern, "coloraxis"), (template, "coloraxis"), (pattern - template, "coloraxis2")], start=1
        ):
            figure.add_heatmap(
                z=z,
                x=positions,
                y=positions,
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
                text=[f"layer {r.layer}, head {r.head}: {interval(r.value, r.low, r.high)}" for r in part.itertuples()],
                hovertemplate="%{text}<extra>" + plain(CONTROL_LABELS.get(control, control)) + "</extra>",
            )
    figure.update_xaxes(rangemode="tozero")
    return figure.update_layout(**LAYOUT, height=430, legend={"orientation": "h", "y": -0.15})


def distance_matrix(rows: pd.DataFrame) -> go.Figure:
    """The distance between every two models with its interval; on the diagonal that between seeds of one model, blank
    where there is one seed.

    Rows: model_a, model_b, value, low, high; each pair once, in either order.
    """
    rows = some(rows, "model distances")
    models = list(dict.fromkeys([*rows["model_a"], *rows["model_b"]]))
    z = pd.DataFrame(np.nan, index=models, columns=models)
    text = pd.DataFrame("", index=models, columns=models)
    for r in rows.itertuples():
        for a, b in {(r.model_a, r.model_b), (r.model_b, r.model_a)}:
            z.loc[a, b] = r.value
            text.loc[a, b] = f"{r.value:.3f}<br>[{r.low:.3f}, {r.high:.3f}]"
    for model in models:
        if np.isnan(z.loc[model, model]):
            text.loc[model, model] = "one seed"
    names = [plain(m) for m in models]
    figure = go.Figure(
        go.Heatmap(
            z=z.to_numpy(),
            x=names,
            y=names,
            text=text.to_numpy(),
            texttemplate="%{text}",
            colorscale="Blues",
            hoverongaps=False,
            hovertemplate="%{y} and %{x}: %{text}<extra></extra>",
            colorbar={"title": "distance"},
        )
    )
    figure.update_yaxes(autorange="reversed")
    return figure.update_layout(**LAYOUT, height=110 + 75 * len(models))


def f_rel_curves(curves: pd.DataFrame, shares: pd.DataFrame, name: str = "none") -> go.Figure:
    """f_rel of every head against the distance, a panel a head, over the ALiBi line and the T5 bias nearest to it.

    Rows of ``curves``: layer, head, curve, index, value, low, high, and control ("none", "untrained") where there is
    one; of ``shares``: layer, head, scope, part, metric, value (of these, slope and toeplitz_r2 are shown). ``name`` is
    the encoding, for its colour.
    """
    rows = some(curves[curves["curve"] == "f_rel"], "f_rel curves")
    rows = rows if "control" in rows else rows.assign(control="none")
    shares = shares[shares["control"] == "none"] if "control" in shares else shares
    shares = shares[(shares["scope"] == "seen") & (shares["part"] == "distance")]
    of = shares.pivot(index=["layer", "head"], columns="metric", values="value")
    layers, heads = rows["layer"].nunique(), rows["head"].nunique()
    figure = make_subplots(
        rows=layers,
        cols=heads,
        shared_xaxes=True,
        horizontal_spacing=0.035,
        vertical_spacing=min(0.09, 0.25 / layers),
        subplot_titles=[
            f"{layer}.{head}: slope {of.loc[(layer, head), 'slope']:.3f}, R² {of.loc[(layer, head), 'toeplitz_r2']:.2f}"
            for layer, head in rows[["layer", "head"]].drop_duplicates().itertuples(index=False)
        ],
    )
    for panel, ((layer, head), part) in enumerate(rows.groupby(["layer", "head"])):
        at = {"row": panel // heads + 1, "col": panel % heads + 1}
        first = panel == 0
        # Distances that only few rows reach are mostly noise and would set the scale: the last tenth is left out.
        part = part[part["index"] < 0.9 * (part["index"].max() + 1)].sort_values("index")
        line = _spaced(part[part["control"] == "none"])
        d = line["index"].to_numpy()
        if line["low"].notna().all():
            figure.add_scatter(
                x=[*d, *d[::-1]], y=[*line["high"], *line["low"][::-1]], fill="toself", mode="none", opacity=0.2,
                fillcolor=colour(name), hoverinfo="skip", showlegend=False, **at,
            )  # fmt: skip
        untrained = _spaced(part[part["control"] == "untrained"])
        shown = [("f_rel, trained", d, line["value"].to_numpy(), colour(name), "solid")]
        if len(untrained):
            shown.append(("f_rel, untrained", untrained["index"], untrained["value"], "#999999", "solid"))
        of_head = curves[(curves["layer"] == layer) & (curves["head"] == head) & curves["index"].isin(d)]
        if "control" in of_head:
            of_head = of_head[of_head["control"] == "none"]
        for curve, label, stroke, dash in IMITATIONS:
            imitation = of_head[of_head["curve"] == curve].sort_values("index")
            shown.append((label, imitation["index"], imitation["value"], stroke, dash))
        for label, x, y, stroke, dash in shown:
            figure.add_scatter(
                x=list(x), y=list(y), name=label, legendgroup=label, showlegend=first, mode="lines",
                line={"color": stroke, "dash": dash, "width": 2 if dash == "solid" else 1.3},
                hovertemplate="distance %{x}: %{y:.3f} nats<extra>" + label + "</extra>", **at,
            )  # fmt: skip
    figure.update_annotations(font_size=11)
    for column in range(1, heads + 1):
        figure.update_xaxes(title="distance", row=layers, col=column)
    for row in range(1, layers + 1):
        figure.update_yaxes(title="nats", row=row, col=1)
    return figure.update_layout(**LAYOUT, height=120 + 190 * layers, legend={"orientation": "h", "y": -0.14})


def head_grid(rows: pd.DataFrame, name: str = "value") -> go.Figure:
    """One number a head, layer × head, with its interval where there is one.

    Rows: layer, head, value, and perhaps low and high: one row a head. ``name`` says what the number is.
    """
    rows = some(rows, f"{name} by head")
    if rows.duplicated(["layer", "head"]).any():
        raise ProbeError("a grid of heads wants one row a head, got several of one: pick a metric, template, model, …")
    z = rows.pivot(index="layer", columns="head", values="value")
    if "low" in rows:
        text = rows.assign(text=[interval(r.value, r.low, r.high) for r in rows.itertuples()])
    else:
        text = rows.assign(text=rows["value"].map("{:.3f}".format))
    figure = go.Figure(
        go.Heatmap(
            z=z.to_numpy(),
            x=z.columns.tolist(),
            y=z.index.tolist(),
            customdata=text.pivot(index="layer", columns="head", values="text").to_numpy(),
            texttemplate="%{z:.2f}",
            hovertemplate="layer %{y}, head %{x}: %{customdata}<extra></extra>",
            colorscale="Blues",
            colorbar={"title": plain(name)},
            xgap=2,
            ygap=2,
        )
    )
    figure.update_xaxes(title="head", dtick=1)
    figure.update_yaxes(title="layer", dtick=1, autorange="reversed")
    return figure.update_layout(**LAYOUT, height=150 + 45 * len(z))


def entropy_by_query(rows: pd.DataFrame, metric: str = "entropy") -> go.Figure:
    """Entropy (or any other metric of ``attention_summary`` and of ``stream(…).rows()``) of every head against the
    query's position, a panel an encoding; for entropy the greatest possible, ln(t + 1), is dotted.

    Rows: layer, head, query, metric, value, and perhaps encoding and control (of which "none" is drawn).
    """
    rows = rows if "encoding" in rows else rows.assign(encoding="")
    rows = rows[rows["control"] == "none"] if "control" in rows else rows
    rows = some(rows[rows["metric"] == metric], f"{metric} by query")
    encodings = list(dict.fromkeys(rows["encoding"]))
    shades = ("#c6dbef", "#6baed6", "#2171b5", "#08306b")
    figure = make_subplots(cols=len(encodings), shared_yaxes=True, subplot_titles=[plain(e) for e in encodings],
                           horizontal_spacing=0.015)  # fmt: skip
    n_layers = rows["layer"].max() + 1
    for column, encoding in enumerate(encodings, start=1):
        of = rows[rows["encoding"] == encoding]
        for (layer, head), line in of.groupby(["layer", "head"]):
            line = _spaced(line.sort_values("query"))
            figure.add_scatter(
                x=line["query"].tolist(), y=line["value"].tolist(), row=1, col=column, mode="lines",
                line={"color": shades[min(3, 4 * layer // n_layers)], "width": 1.5}, name=f"layer {layer}",
                legendgroup=f"layer {layer}", showlegend=column == 1 and head == 0,
                hovertemplate=f"layer {layer}, head {head}, query %{{x}}: %{{y:.3f}}<extra></extra>",
            )  # fmt: skip
        if metric == "entropy":
            x = sorted(of["query"].unique())
            figure.add_scatter(
                x=x, y=[math.log(t + 1) for t in x], row=1, col=column, mode="lines", name="uniform, ln(t + 1)",
                legendgroup="bound", showlegend=column == 1, line={"color": "#777777", "dash": "dot"},
            )  # fmt: skip
    figure.update_xaxes(title="query position")
    figure.update_yaxes(title="nats" if metric == "entropy" else metric.replace("_", " "), col=1)
    return figure.update_layout(**LAYOUT, height=360, legend={"orientation": "h", "y": -0.3})


def census_grid(rows: pd.DataFrame) -> go.Figure:
    """The label of every head, layer × head, a panel an encoding; the shade is how much of the pattern's variance its
    best template explains; hovering shows every score.

    Rows: those of ``census`` with encoding.
    """
    rows = some(rows, "a census")
    encodings = list(dict.fromkeys(rows["encoding"]))
    figure = make_subplots(cols=len(encodings), subplot_titles=[plain(e) for e in encodings], horizontal_spacing=0.03)
    for column, encoding in enumerate(encodings, start=1):
        of = rows[rows["encoding"] == encoding]
        heads = of.drop_duplicates(["layer", "head"])
        scores = of.groupby(["layer", "head"]).apply(_scores_in_words, include_groups=False)
        shade = of[of["metric"] == "explained_variance"]
        figure.add_heatmap(
            z=shade.pivot(index="layer", columns="head", values="value").to_numpy(),
            text=heads.assign(label=heads["label"].map(lambda x: SHORT_LABELS.get(x, x)))
            .pivot(index="layer", columns="head", values="label")
            .to_numpy(),
            customdata=scores.unstack().to_numpy(),
            texttemplate="%{text}",
            hovertemplate="%{customdata}<extra></extra>",
            coloraxis="coloraxis",
            xgap=2,
            ygap=2,
            row=1,
            col=column,
        )
    figure.update_xaxes(title="head", dtick=1)
    figure.update_yaxes(dtick=1, autorange="reversed")
    figure.update_yaxes(title="layer", col=1)
    # Light enough for the labels upon it.
    scale = {"colorscale": ["#ffffff", "#6baed6"], "cmin": 0, "cmax": 1, "colorbar": {"title": "explained"}}
    return figure.update_layout(**LAYOUT, height=150 + 60 * rows["layer"].nunique(), coloraxis=scale)


def census_losses(rows: pd.DataFrame) -> go.Figure:
    """What the model loses when the pattern of a head is replaced, a panel an encoding, with intervals.

    Rows: those of ``census`` with encoding, of the metrics loss_….
    """
    rows = some(rows[rows["metric"].isin(list(LOSSES))], "ablated heads")
    encodings = list(dict.fromkeys(rows["encoding"]))
    figure = make_subplots(
        rows=len(encodings),
        shared_xaxes=True,
        subplot_titles=[plain(e) for e in encodings],
        vertical_spacing=min(0.06, 0.3 / len(encodings)),
    )
    for row, encoding in enumerate(encodings, start=1):
        of = rows[rows["encoding"] == encoding]
        for metric, (label, stroke) in LOSSES.items():
            line = of[of["metric"] == metric]
            figure.add_scatter(
                x=[f"{int(r.layer)}.{int(r.head)}" for r in line.itertuples()],
                y=line["value"].tolist(),
                mode="markers",
                name=f"replaced {label}",
                legendgroup=metric,
                showlegend=row == 1,
                marker={"color": stroke, "size": 8},
                error_y=interval_bars(line, width=3, thickness=1.2),
                hovertemplate="head %{x}: %{y:.4f} nats<extra>" + label + "</extra>",
                row=row,
                col=1,
            )
        figure.add_hline(y=0, line_width=1, line_color="#999999", row=row, col=1)
    figure.update_xaxes(type="category")
    figure.update_yaxes(title="change of loss")
    figure.update_xaxes(title="layer.head", row=len(encodings), col=1)
    height = 170 + 190 * len(encodings)
    return figure.update_layout(**LAYOUT, height=height, legend={"orientation": "h", "y": -70 / height})


def _scores_in_words(part: pd.DataFrame) -> str:
    first = part.iloc[0]
    scores = "<br>".join(f"{r.metric}: {interval(r.value, r.low, r.high)}" for r in part.itertuples())
    return (
        f"{plain(first['label'])}; template {plain(first['template'])}; used for {plain(first['used_for'])}<br>{scores}"
    )


def _spaced(line: pd.DataFrame, most: int = 256) -> pd.DataFrame:
    """At most so many rows of a long line, evenly spread."""
    return line if len(line) <= most else line.iloc[np.unique(np.linspace(0, len(line) - 1, most).round().astype(int))]
