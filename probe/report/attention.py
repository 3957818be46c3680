"""Figures of attention: maps beside templates, distances, f_rel curves, entropy, and the census of heads."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from probe.errors import ProbeError
from probe.report.drawing import add_band, counted, interval, interval_bars, matrix, plain, signed_zero, some
from probe.report.style import (
    ATTENTION_SCALE,
    BENEATH_TEXT,
    BLUE,
    CONTROL_LABELS,
    DIVERGING,
    GREY,
    STRONG,
    colour,
    colour_bar,
    finish,
    look,
    panel,
    panels,
    title_lowest,
)
from probe.rows import SINK

SHORT_LABELS = {"previous_token": "prev.", "diagonal": "self", "induction": "induct."}
LOSSES = {
    "loss_without_content": ("by its template (content gone)", STRONG, "circle"),
    "loss_without_position": ("by itself with uniform for template (position gone)", BLUE, "square"),
    "loss_uniform": ("by uniform attention (both gone)", GREY, "diamond"),
}
IMITATIONS = (
    ("f_rel_alibi", "ALiBi's nearest line", STRONG, "dash"),
    ("f_rel_t5", "T5's nearest bias", BLUE, "dot"),
)
MOST_LABELS, FEW_LABELS = 48, 12  # tokens that an axis of a map can name, and in larger type


def plot_attention_maps(rows: pd.DataFrame, labels: Sequence[str] | None = None) -> go.Figure:
    """Each head's mean pattern, its template, and their difference, side by side, on one scale of colours.

    Rows: layer, head, template, query, key, pattern, template_pattern, template_distance (nats; one value a head), as
    ``probe.attention.attention_maps`` makes them. Maps of long contexts are pooled there: their axes say so.
    ``labels`` name the positions where all sequences hold the same tokens, in their order.

    Raises:
        ProbeError: without rows, or with another number of labels than of positions.
    """
    rows = some(rows, "attention maps")
    heads = list(rows.groupby(["layer", "head"], sort=True))
    titles = []
    for (layer, head), part in heads:
        first = part.iloc[0]
        nearest = f"{plain(first['template'])}<br>{first['template_distance']:.3f} nats away"
        titles.append([f"layer {layer}, head {head}", nearest, "difference"])
    figure, places = panels(titles, height=250, most=3, gap=85, beside=0.05, shared_y=False)
    for row, (_, part) in enumerate(heads):
        pattern, template = matrix(part, "pattern"), matrix(part, "template_pattern")
        beside = [(pattern, "coloraxis"), (template, "coloraxis"), (pattern - template, "coloraxis2")]
        for place, (z, axis) in zip(places[3 * row : 3 * row + 3], beside, strict=True):
            _add_map(figure, z, np.unique(part["key"]), labels, axis, place)
    _name_axes(figure, places, rows)
    largest = float((rows["pattern"] - rows["template_pattern"]).abs().max()) or 1.0
    attention = {"colorscale": ATTENTION_SCALE, "cmin": 0, "cmax": 1}
    difference = DIVERGING | {"cmin": -largest, "cmax": largest}
    return finish(
        figure,
        coloraxis=attention | {"colorbar": colour_bar("attention", figure, share=0.44)},
        coloraxis2=difference | {"colorbar": colour_bar("difference", figure, top=0.48, share=0.44)},
    )


def plot_attention_grid(rows: pd.DataFrame, labels: Sequence[str] | None = None) -> go.Figure:
    """The pattern of every head in small, a row of panels a layer, on one scale of colours.

    Rows and ``labels`` as in ``plot_attention_maps``; of the rows only layer, head, query, key and pattern are wanted.
    """
    rows = some(rows, "attention maps")
    heads = list(rows.groupby(["layer", "head"], sort=True))
    layers = [[f"{layer}.{head}" for (layer, head), _ in heads if layer == each] for each in rows["layer"].unique()]
    figure, places = panels(layers, height=105, most=8, gap=30, beside=0.012, shared_y=False)
    for place, (_, part) in zip(places, heads, strict=True):
        _add_map(figure, matrix(part, "pattern"), np.unique(part["key"]), labels, "coloraxis", place)
    figure.update_xaxes(showticklabels=False, ticks="")
    figure.update_yaxes(showticklabels=False, ticks="")
    _name_axes(figure, places, rows)
    bar = colour_bar("attention", figure)
    return finish(figure, coloraxis={"colorscale": ATTENTION_SCALE, "cmin": 0, "cmax": 1, "colorbar": bar})


def _add_map(
    figure: go.Figure, z: np.ndarray, positions: np.ndarray, labels: Sequence[str] | None, axis: str,
    place: dict[str, int],
) -> None:  # fmt: skip
    """A triangle of queries and keys. Places are numbers even where tokens name them: two may be alike.

    A learned sink is a key before the first token, named so.
    """
    sink = [SINK] if SINK in positions else []
    if labels is not None and len(labels) != len(z):
        raise ProbeError(f"labels must be one for each position, {len(z)}, got {len(labels)}")
    queries = positions[len(sink) :].tolist() if labels is None else list(range(len(z)))
    names = [str(q) for q in queries] if labels is None else [plain(label) for label in labels]
    of_keys = [*("sink" for _ in sink), *names]
    figure.add_heatmap(
        z=z, x=[*sink, *queries], y=queries, coloraxis=axis, hoverongaps=False,
        customdata=[[f"query {q}, key {k}" for k in of_keys] for q in names] if sink or labels is not None else None,
        hovertemplate=("%{customdata}" if sink or labels is not None else "query %{y}, key %{x}") +
        ": %{z:.3f}<extra></extra>", **place,
    )  # fmt: skip
    if labels is not None:
        shown = range(0, len(names), -(-len(names) // MOST_LABELS))
        few = len(shown) <= FEW_LABELS
        ticks = {"tickvals": list(shown), "ticktext": [names[i] for i in shown], "tickfont": {"size": 11 if few else 9}}
        figure.update_xaxes(**ticks, tickangle=0 if few and max(map(len, names)) < 4 else -90, **place)
        figure.update_yaxes(**ticks, **place)
    if sink:
        every = queries[:: -(-len(queries) // (4 if labels is None else MOST_LABELS))]
        named = [names[queries.index(q)] for q in every]
        figure.update_xaxes(tickvals=[SINK, *every], ticktext=["sink", *named], tickangle=-90, **place)
    figure.update_xaxes(constrain="domain", **place)
    figure.update_yaxes(autorange="reversed", **place)


def _name_axes(figure: go.Figure, places: Sequence[dict[str, int]], rows: pd.DataFrame) -> None:
    """Titles, which say how many positions a cell of a pooled map holds."""
    widest = int(np.diff(np.unique(rows["key"])).max(initial=1))
    key, query = ("position", "position") if widest == 1 else (f"(sums of {widest} a cell)", f"(means of {widest})")
    title_lowest(figure, places, f"key {key}")
    figure.update_yaxes(title=f"query {query}", col=1)


def plot_template_distances(rows: pd.DataFrame) -> go.Figure:
    """How far each head lies from each template: a point a head, one panel per model, untrained models in grey.

    Rows: model, control, layer, head, template, value, low, high.
    """
    rows = some(rows, "template distances")
    encodings = list(dict.fromkeys(rows["model"]))
    height = 40 + 21 * rows["template"].nunique()
    figure, places = panels([[plain(e) for e in encodings]], height=height, beside=0.015)
    for place, encoding in zip(places, encodings, strict=True):
        for control, part in rows[rows["model"] == encoding].groupby("control", sort=False):
            trained, label = control == "none", plain(CONTROL_LABELS.get(control, control))
            figure.add_scatter(
                x=part["value"].tolist(), y=part["template"].map(plain).tolist(), mode="markers", name=label,
                legendgroup=control, showlegend=place == places[0],
                marker={
                    "color": colour(encoding) if trained else GREY, "size": 7 if trained else 9, "opacity": 0.6,
                    "symbol": look(encoding).symbol if trained else "line-ns-open",
                },
                text=[f"layer {r.layer}, head {r.head}: {interval(r.value, r.low, r.high)}" for r in part.itertuples()],
                hovertemplate="%{text}<extra>" + label + "</extra>", **place,
            )  # fmt: skip
    figure.update_xaxes(rangemode="tozero")
    title_lowest(figure, places, f"distance, nats{counted(rows, '')}" if len(encodings) < 4 else "nats")
    return finish(figure)


def plot_distance_matrix(rows: pd.DataFrame) -> go.Figure:
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
    figure = panel(max(120, 60 * len(models)))
    figure.add_heatmap(
        z=z.to_numpy(), x=names, y=names, text=text.to_numpy(), texttemplate="%{text}", textfont={"size": 12},
        colorscale=BENEATH_TEXT, hoverongaps=False, hovertemplate="%{y} and %{x}: %{text}<extra></extra>",
        xgap=2, ygap=2, colorbar=colour_bar(f"distance<br>{counted(rows, '').strip()}", figure),
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    return finish(figure)


def plot_f_rel_curves(curves: pd.DataFrame, shares: pd.DataFrame, name: str = "none") -> go.Figure:
    """f_rel of every head against the distance, a panel a head, over the ALiBi line and the T5 bias nearest to it.

    Rows of ``curves``: layer, head, curve, index, value, low, high, and control ("none", "untrained") where there is
    one; of ``shares``: layer, head, scope, part, metric, value (of these, slope and toeplitz_r2 are shown, where there
    are any rows). ``name`` is the encoding, for its colour.
    """
    rows = some(curves[curves["curve"] == "f_rel"], "f_rel curves")
    rows = rows if "control" in rows else rows.assign(control="none")
    heads = rows[["layer", "head"]].drop_duplicates().sort_values(["layer", "head"])
    said = _shares_in_words(shares) if len(shares) else {}
    titles = [
        [f"{layer}.{head}{said.get((layer, head), '')}" for layer, head in part.itertuples(index=False)]
        for _, part in heads.groupby("layer")
    ]
    figure, places = panels(titles, height=150, most=4, gap=48, beside=0.035, shared_y=False)
    figure.update_annotations(font_size=11)
    for place, ((layer, head), part) in zip(places, rows.groupby(["layer", "head"]), strict=True):
        # Distances that only few rows reach are mostly noise and would set the scale: the last tenth is left out.
        part = part[part["index"] < 0.9 * (part["index"].max() + 1)].sort_values("index")
        line = _spaced(part[part["control"] == "none"])
        d = line["index"].tolist()
        add_band(figure, d, line, colour(name), "f_rel", **place)
        untrained = _spaced(part[part["control"] == "untrained"])
        shown = [("f_rel", d, line["value"], colour(name), "solid")]
        if len(untrained):
            shown.append(("f_rel, untrained", untrained["index"], untrained["value"], GREY, "solid"))
        of_head = curves[(curves["layer"] == layer) & (curves["head"] == head) & curves["index"].isin(d)]
        if "control" in of_head:
            of_head = of_head[of_head["control"] == "none"]
        for curve, label, stroke, dash in IMITATIONS:
            imitation = of_head[of_head["curve"] == curve].sort_values("index")
            shown.append((label, imitation["index"], imitation["value"], stroke, dash))
        for label, x, y, stroke, dash in shown:
            figure.add_scatter(
                x=list(x), y=list(y), name=label, legendgroup=label, showlegend=place == places[0], mode="lines",
                line={"color": stroke, "dash": dash, "width": 2 if dash == "solid" else 1.3},
                hovertemplate="distance %{x}: %{y:.3f} nats<extra>" + label + "</extra>", **place,
            )  # fmt: skip
    title_lowest(figure, places, "distance, tokens")
    figure.update_yaxes(title="nats", col=1)
    return finish(figure)


def _shares_in_words(shares: pd.DataFrame) -> dict[tuple[int, int], str]:
    """Slope and R² of every head, as the titles of ``plot_f_rel_curves`` have them."""
    shares = shares[shares["control"] == "none"] if "control" in shares else shares
    shares = shares[(shares["scope"] == "seen") & (shares["part"] == "distance")]
    of = shares.pivot(index=["layer", "head"], columns="metric", values="value")
    return {
        (layer, head): f": slope {signed_zero(row['slope'])}, R² {row['toeplitz_r2']:.2f}"
        for (layer, head), row in of.iterrows()
    }


def plot_head_grid(rows: pd.DataFrame, name: str = "value") -> go.Figure:
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
    figure = panel(max(110, 20 + 40 * len(z)))
    figure.add_heatmap(
        z=z.to_numpy(), x=z.columns.tolist(), y=z.index.tolist(), texttemplate="%{z:.2f}", colorscale=BENEATH_TEXT,
        customdata=text.pivot(index="layer", columns="head", values="text").to_numpy(),
        hovertemplate="layer %{y}, head %{x}: %{customdata}<extra></extra>", colorbar=colour_bar(plain(name), figure),
        xgap=2, ygap=2,
    )  # fmt: skip
    figure.update_xaxes(title="head", dtick=1)
    figure.update_yaxes(title="layer", dtick=1, autorange="reversed")
    return finish(figure)


def plot_entropy_by_query(rows: pd.DataFrame, metric: str = "entropy") -> go.Figure:
    """Entropy (or any other metric of ``attention_summary`` and of ``stream(…).rows()``) of every head against the
    query's position, one panel per model; for entropy the greatest possible, ln(n_visible), is dotted.

    Rows: layer, head, query, metric, value, n_visible (for entropy), and perhaps model and control (of which "none"
    is drawn).
    """
    rows = rows if "model" in rows else rows.assign(model="")
    rows = rows[rows["control"] == "none"] if "control" in rows else rows
    rows = some(rows[rows["metric"] == metric], f"{metric} by query")
    encodings, layers = list(dict.fromkeys(rows["model"])), sorted(set(rows["layer"]))
    shades = _shades(len(layers))
    figure, places = panels([[plain(e) for e in encodings]], height=230, beside=0.015)
    for place, encoding in zip(places, encodings, strict=True):
        of, first, shown = rows[rows["model"] == encoding], place == places[0], set()
        for (layer, head), line in of.groupby(["layer", "head"]):
            line = _spaced(line.sort_values("query"))
            figure.add_scatter(
                x=line["query"].tolist(), y=line["value"].tolist(), mode="lines", name=f"heads of layer {layer}",
                line={"color": shades[layers.index(layer)], "width": 1.5}, legendgroup=f"layer {layer}",
                showlegend=first and layer not in shown,
                hovertemplate=f"layer {layer}, head {head}, query %{{x}}: %{{y:.3f}}<extra></extra>", **place,
            )  # fmt: skip
            shown.add(layer)
        if metric == "entropy":
            # A line for all layers that show as many keys, one more for each window.
            bounds = {tuple(zip(line["query"], line["n_visible"], strict=True)) for _, line in
                      of.drop_duplicates(["layer", "query"]).sort_values("query").groupby("layer")}  # fmt: skip
            for i, bound in enumerate(sorted(bounds)):
                figure.add_scatter(
                    x=[query for query, _ in bound], y=[math.log(n) for _, n in bound], mode="lines",
                    name="uniform, ln(visible keys)", legendgroup="bound", showlegend=first and not i,
                    line={"color": GREY, "dash": "dot"}, **place,
                )  # fmt: skip
    title_lowest(figure, places, "query position")
    unit = f"entropy, nats{counted(rows)}" if metric == "entropy" else metric.replace("_", " ") + counted(rows)
    figure.update_yaxes(title=unit, col=1)
    return finish(figure)


def plot_census_grid(rows: pd.DataFrame) -> go.Figure:
    """The label of every head, layer × head, one panel per model; the shade is how much of the pattern's variance its
    best template explains; hovering shows every score.

    Rows: those of ``census`` with model.
    """
    rows = some(rows, "a census")
    encodings = list(dict.fromkeys(rows["model"]))
    # A cell has to hold its label.
    most = max(1, 14 // rows["head"].nunique())
    height = max(110, 10 + 42 * rows["layer"].nunique())
    figure, places = panels([[plain(e) for e in encodings]], height=height, most=most, beside=0.03, shared_y=False)
    for place, encoding in zip(places, encodings, strict=True):
        of = rows[rows["model"] == encoding]
        heads = of.drop_duplicates(["layer", "head"])
        scores = of.groupby(["layer", "head"]).apply(_scores_in_words, include_groups=False)
        shade = of[of["metric"] == "explained_variance"].pivot(index="layer", columns="head", values="value")
        labels = heads.assign(label=heads["label"].map(lambda x: SHORT_LABELS.get(x, x)))
        figure.add_heatmap(
            z=shade.to_numpy(), x=shade.columns.tolist(), y=shade.index.tolist(),
            text=labels.pivot(index="layer", columns="head", values="label").to_numpy(),
            customdata=scores.unstack().to_numpy(), texttemplate="%{text}", textfont={"size": 11},
            hovertemplate="%{customdata}<extra></extra>", coloraxis="coloraxis", xgap=2, ygap=2, **place,
        )  # fmt: skip
    figure.update_xaxes(dtick=1)
    figure.update_yaxes(dtick=1, autorange="reversed")
    figure.update_yaxes(title="layer", col=1)
    title_lowest(figure, places, f"head{counted(rows)}" if len(encodings) < 4 else "head")
    bar = colour_bar("variance<br>explained", figure)
    return finish(figure, coloraxis={"colorscale": BENEATH_TEXT, "cmin": 0, "cmax": 1, "colorbar": bar})


def plot_census_losses(rows: pd.DataFrame) -> go.Figure:
    """What the model loses when the pattern of a head is replaced, one panel per model, with intervals.

    Rows: those of ``census`` with model, of the metrics loss_….
    """
    rows = some(rows[rows["metric"].isin(list(LOSSES))], "ablated heads")
    encodings = list(dict.fromkeys(rows["model"]))
    figure, places = panels([[plain(e)] for e in encodings], height=150, gap=58)
    for place, encoding in zip(places, encodings, strict=True):
        of = rows[rows["model"] == encoding]
        for metric, (label, stroke, symbol) in LOSSES.items():
            line = of[of["metric"] == metric]
            figure.add_scatter(
                x=[f"{int(r.layer)}.{int(r.head)}" for r in line.itertuples()], y=line["value"].tolist(),
                mode="markers", name=f"replaced {label}", legendgroup=metric, showlegend=place == places[0],
                marker={"color": stroke, "size": 8, "symbol": symbol},
                error_y=interval_bars(line, width=3, thickness=1.2),
                hovertemplate="head %{x}: %{y:.4f} nats<extra>" + label + "</extra>", **place,
            )  # fmt: skip
        figure.add_hline(y=0, line_width=1, line_color=GREY, **place)
    figure.update_xaxes(type="category")
    figure.update_yaxes(title="change of loss,<br>nats a token")
    title_lowest(figure, places, f"layer.head{counted(rows)}")
    return finish(figure)


def _scores_in_words(part: pd.DataFrame) -> str:
    first = part.iloc[0]
    scores = "<br>".join(f"{r.metric}: {interval(r.value, r.low, r.high)}" for r in part.itertuples())
    return (
        f"{plain(first['label'])}; template {plain(first['template'])}; used for {plain(first['used_for'])}<br>{scores}"
    )


def _shades(n: int) -> list[str]:
    """Colours of so many layers, from light to dark."""
    return sample_colorscale("Blues", np.linspace(0.35, 1, max(n, 1)).tolist())


def _spaced(line: pd.DataFrame, most: int = 256) -> pd.DataFrame:
    """At most so many rows of a long line, evenly spread."""
    return line if len(line) <= most else line.iloc[np.unique(np.linspace(0, len(line) - 1, most).round().astype(int))]
