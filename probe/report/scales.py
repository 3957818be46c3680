"""Figures of attention temperatures: λ by head and length, what it does, and the entropy that it answers."""

import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from probe.report.drawing import counted, interval, interval_bars, plain, signed_zero, some
from probe.report.style import BENEATH_TEXT, GREY, colour_bar, finish, look, panels, title_lowest
from probe.report.tables import of
from probe.report.variants import (
    MARKS,
    first_of,
    label,
    legend_line,
    made_for,
    mark_of,
    mark_trained,
    ordered,
    position_ticks,
    stroke_of,
)

SPLITS = {"trained": "trained lengths", "longer": "longer sequences"}
TEMPERATURES = {"loss": "loss, nats a token", "exact_match": "exact match"}
PUBLISHED_SLOPE = 0.3973  # Wang et al. 2024
KEYS = ["model", "layer", "head", "extension"]


def plot_scale_map(rows: pd.DataFrame) -> go.Figure:
    """λ of every head, layer × head, one panel per model and extension.

    Rows: measurement "head_scale", metric "scale", variant "head", model, layer, head, extension, value.
    """
    rows = some(of(rows, "head_scale", metric="scale", variant="head"), "the scales of heads")
    parts = list(rows.groupby(["model", "extension"], sort=False))
    n_heads, n_layers = rows["head"].nunique(), rows["layer"].nunique()
    groups = [
        [f"{plain(e)}, made for {extension:g}×" for (e, extension), _ in parts if e == encoding]
        for encoding in dict.fromkeys(rows["model"])
    ]
    # A cell has to hold its number.
    most = min(4, max(1, 26 // n_heads))
    figure, places = panels(groups, most=most, height=30 + 30 * n_layers, gap=75, beside=0.05, shared_y=False)
    for place, (_, part) in zip(places, parts, strict=True):
        grid = part.pivot(index="layer", columns="head", values="value")
        figure.add_heatmap(
            z=grid.to_numpy(dtype=float),
            x=grid.columns.astype(int).tolist(),
            y=grid.index.astype(int).tolist(),
            texttemplate="%{z:.2f}",
            textfont={"size": 11},
            hovertemplate="layer %{y}, head %{x}: λ %{z:.4f}<extra></extra>",
            coloraxis="coloraxis",
            xgap=2,
            ygap=2,
            **place,
        )
    figure.update_xaxes(dtick=1)
    figure.update_yaxes(dtick=1, autorange="reversed")
    figure.update_yaxes(title="layer", col=1)
    title_lowest(figure, places, "head")
    largest = max(float(rows["value"].max()), 1.01)
    scale = {"colorscale": BENEATH_TEXT, "cmin": 1, "cmax": largest, "colorbar": colour_bar("λ", figure)}
    return finish(figure, coloraxis=scale)


def plot_scale_law(rows: pd.DataFrame) -> go.Figure:
    """The scales found against the extension s they were made for, one panel per model, under the fitted law
    1 + a ln s. Thin bars span the heads, least to most; bands are intervals of a. Dashed: the published law.

    Rows: measurement "head_scale", metric "scale", model, variant, extension, value (a row a head); and measurement
    "scale_law", encoding, variant, metric ("slope", with value, low, high; "r2").
    """
    points = some(of(rows, "head_scale", metric="scale"), "scales by extension")
    points = some(points[points["extension"].notna()], "scales by extension")
    laws = of(rows, "scale_law")
    encodings = list(dict.fromkeys(points["model"]))
    extensions = sorted(set(points["extension"].astype(float)))
    s = np.geomspace(1, max(*extensions, 2), 60)
    variants = ordered(points["variant"])
    figure, places = panels([[plain(e) for e in encodings]], most=3, height=300)
    for place, encoding in zip(places, encodings, strict=True):
        first = place == places[0]
        figure.add_scatter(
            x=s, y=1 + PUBLISHED_SLOPE * np.log(s), mode="lines", name=f"published: 1 + {PUBLISHED_SLOPE} ln s",
            legendgroup="published", showlegend=first, line={"color": GREY, "dash": "dash"}, hoverinfo="skip", **place,
        )  # fmt: skip
        for i, variant in enumerate(variants):
            part = points[(points["model"] == encoding) & (points["variant"] == variant)]
            if part.empty:
                continue
            stroke, group = stroke_of(variant), f"{encoding} {variant}"
            law = laws[(laws["model"] == encoding) & (laws["variant"] == variant)].set_index("metric")
            name = label(variant) if len(encodings) == 1 else f"{plain(encoding)}, {label(variant)}"
            if "slope" in law.index:
                slope = law.loc["slope"]
                known = pd.notna(slope["low"]) and pd.notna(slope["high"])  # not where one point fixes the slope
                if known:
                    figure.add_scatter(
                        x=[*s, *s[::-1]], y=[*(1 + slope["high"] * np.log(s)), *(1 + slope["low"] * np.log(s[::-1]))],
                        fill="toself", mode="none", opacity=0.15, fillcolor=stroke, hoverinfo="skip", showlegend=False,
                        legendgroup=group, **place,
                    )  # fmt: skip
                figure.add_scatter(
                    x=s, y=1 + slope["value"] * np.log(s), mode="lines", line={"color": stroke}, hoverinfo="skip",
                    showlegend=False, legendgroup=group, **place,
                )  # fmt: skip
                bounds = f" [{slope['low']:.2f}, {slope['high']:.2f}]" if known else ""
                name += f": 1 + {slope['value']:.2f}{bounds} ln s"
                if "r2" in law.index and pd.notna(law.loc["r2", "value"]):
                    name += f", R² {law.loc['r2', 'value']:.3f}"
            mean = part.groupby("extension")["value"].agg(["mean", "min", "max"])
            figure.add_scatter(
                x=[e * 1.02 ** (i - (len(variants) - 1) / 2) for e in mean.index],
                y=mean["mean"].tolist(),
                mode="markers",
                name=name,
                legendgroup=group,
                marker={"color": stroke, "symbol": mark_of(variant), "size": 9},
                error_y=interval_bars(mean.set_axis(["value", "low", "high"], axis=1)),
                customdata=[f"{e:g}×: λ {m:.3f}, heads {a:.3f} to {b:.3f}" for e, m, a, b in mean.itertuples()],
                hovertemplate="%{customdata}<extra>" + label(variant) + "</extra>",
                **place,
            )
    ticks = sorted({1.0, *extensions})
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{t:g}×" for t in ticks])
    figure.update_xaxes(range=[-0.02, 1.04 * math.log10(s[-1])])
    title_lowest(figure, places, "extension s")
    figure.update_yaxes(title="λ, mean and range over heads", col=1)
    return finish(figure)


def plot_entropy_by_position(rows: pd.DataFrame, train_length: int) -> go.Figure:
    """The entropy of attention against the number of keys, one row of panels per model, a panel a layer: the mean over
    heads, a line a variant, made for its longest extension; thin lines are the heads of the unchanged model. Dotted:
    the entropy of uniform attention, ln(query + 1).

    Rows: measurement "scaled_entropy", metric "entropy", model, variant, extension, layer, head, query, value.
    """
    rows = some(of(rows, "scaled_entropy", metric="entropy"), "entropy by position")
    longest = rows.groupby(["model", "variant"])["extension"].transform("max")
    rows = rows[rows["extension"].isna() | (rows["extension"] == longest)]
    rows = rows.assign(keys=rows["query"].astype(float) + 1)
    encodings = list(dict.fromkeys(rows["model"]))
    layers = sorted(set(rows["layer"].astype(int)))
    variants = ordered(rows["variant"])
    figure, places = panels(
        [[f"{plain(e)}, layer {layer}" for layer in layers] for e in encodings], most=4, height=210, gap=92
    )
    shown: set[str] = set()
    heads, bound = "its single heads", "uniform attention, ln(query + 1)"
    for place, (encoding, layer) in zip(places, [(e, n) for e in encodings for n in layers], strict=True):
        panel = rows[(rows["model"] == encoding) & (rows["layer"] == layer)]
        if panel.empty:
            continue
        for _, line in panel[panel["variant"] == "none"].groupby("head"):
            line = _spread(line.sort_values("keys"), "keys")
            figure.add_scatter(
                x=line["keys"], y=line["value"], mode="lines", name=f"{label('none')}: {heads}", legendgroup=heads,
                showlegend=first_of(heads, shown), line={"color": "#000000", "width": 0.7}, opacity=0.3,
                hoverinfo="skip", **place,
            )  # fmt: skip
        for variant in variants:
            part = panel[panel["variant"] == variant]
            if part.empty:
                continue
            name = label(variant) + made_for(part["extension"].iloc[0])
            line = _spread(part.groupby("keys", as_index=False)["value"].mean(), "keys")
            figure.add_scatter(
                x=line["keys"], y=line["value"], mode="lines", name=name, legendgroup=name,
                showlegend=first_of(name, shown), line={"color": stroke_of(variant), "width": 2},
                hovertemplate="%{x} keys: %{y:.3f} nats<extra>" + name + "</extra>", **place,
            )  # fmt: skip
        x = _spread(pd.DataFrame({"keys": sorted(set(panel["keys"]))}), "keys")["keys"].tolist()
        figure.add_scatter(
            x=x, y=[math.log(keys) for keys in x], mode="lines", name=bound, legendgroup=bound,
            showlegend=first_of(bound, shown), line={"color": GREY, "dash": "dot", "width": 1.2}, hoverinfo="skip",
            **place,
        )  # fmt: skip
    mark_trained(figure, places, train_length)
    ticks = position_ticks(train_length, float(rows["keys"].max()), float(rows["keys"].min()), fewer=True)
    figure.update_xaxes(type="log", **ticks, tickangle=0, tickfont_size=11)
    title_lowest(figure, places, "keys, query + 1")
    figure.update_yaxes(title=f"entropy, nats{counted(rows, '')}", col=1)
    return finish(figure)


def plot_scale_against_entropy(rows: pd.DataFrame) -> go.Figure:
    """λ of every head against the rise of its entropy beyond the trained length, one panel per model and extension, a
    mark a layer; the title says how they correlate over heads.

    Rows: measurement "head_scale", metric "scale", variant "head"; measurement "entropy_rise", value in nats; both with
    encoding, layer, head, extension; and measurement "scale_entropy" with model, variant "head", extension, metric
    ("spearman"), value, low, high.
    """
    joined = some(beside_entropy(rows), "scales of heads beside the rise of their entropy")
    found = of(rows, "scale_entropy", metric="spearman", variant="head")
    found = {(r.model, r.extension): f"Spearman {_signed(r)}" for r in found.itertuples()}
    parts = list(joined.groupby(["model", "extension"], sort=False))
    titles = [
        f"{plain(e)}, {extension:g}×, n = {len(part)} heads<br>{found.get((e, extension), '')}"
        for (e, extension), part in parts
    ]
    layers = sorted(set(joined["layer"].astype(int)))
    figure, places = panels([titles], most=3, height=280, gap=100)
    shades = sample_colorscale("Viridis", np.linspace(0, 0.9, len(layers)).tolist())
    shown: set[str] = set()
    for place, (_, part) in zip(places, parts, strict=True):
        for i, layer in enumerate(layers):
            of_layer = part[part["layer"] == layer]
            figure.add_scatter(
                x=of_layer["rise"].tolist(), y=of_layer["value"].tolist(), mode="markers", name=f"layer {layer}",
                legendgroup=str(layer), showlegend=len(of_layer) > 0 and first_of(str(layer), shown),
                marker={"color": shades[i], "symbol": MARKS[i % len(MARKS)], "size": 9},
                customdata=[f"layer {layer}, head {int(head)}" for head in of_layer["head"]],
                hovertemplate="%{customdata}: λ %{y:.3f}, rise %{x:.3f} nats<extra></extra>", **place,
            )  # fmt: skip
    title_lowest(figure, places, "rise of the head's entropy, nats")
    figure.update_yaxes(title="λ of a head", col=1)
    return finish(figure)


def plot_loss_by_temperature(rows: pd.DataFrame) -> go.Figure:
    """Loss and exact match against a uniform λ, on trained lengths and on longer ones, one line per model, bars over
    sequences. λ = 1 is the model as it is.

    Rows: measurement "temperature", model, split, scale, metric ("loss", "exact_match"), value, low, high.
    """
    rows = some(of(rows, "temperature"), "temperatures")
    rows = some(rows[rows["metric"].isin(list(TEMPERATURES))], "temperatures")
    splits = [s for s in SPLITS if (rows["split"] == s).any()]
    splits += [s for s in dict.fromkeys(rows["split"]) if s not in SPLITS]
    encodings = list(dict.fromkeys(rows["model"]))
    titles = [[f"{plain(SPLITS.get(split, split))}: {what}" for what in TEMPERATURES.values()] for split in splits]
    figure, places = panels(titles, most=2, height=250, gap=65, shared_y=False, beside=0.09)
    shown: set[str] = set()
    step = float(np.diff(sorted(set(rows["scale"]))).min()) if rows["scale"].nunique() > 1 else 0.0
    for place, (split, metric) in zip(places, [(s, m) for s in splits for m in TEMPERATURES], strict=True):
        for i, encoding in enumerate(encodings):
            line = rows[(rows["split"] == split) & (rows["metric"] == metric) & (rows["model"] == encoding)]
            if line.empty:
                continue
            line = line.sort_values("scale")
            figure.add_scatter(
                x=[scale + 0.06 * step * (i - (len(encodings) - 1) / 2) for scale in line["scale"]],
                y=line["value"].tolist(),
                mode="lines+markers",
                name=plain(encoding),
                legendgroup=encoding,
                showlegend=first_of(encoding, shown),
                line={"color": look(encoding).colour},
                marker={"symbol": look(encoding).symbol, "size": 7},
                error_y=interval_bars(line),
                customdata=[f"λ {r.scale:g}: {interval(r.value, r.low, r.high)}" for r in line.itertuples()],
                hovertemplate="%{customdata}<extra>" + plain(encoding) + "</extra>",
                **place,
            )
        figure.update_yaxes(title=TEMPERATURES[metric] + counted(rows[rows["split"] == split]), **place)
        if metric == "exact_match":
            figure.update_yaxes(range=[-0.03, 1.05], **place)
        figure.add_vline(x=1, line_width=1.5, line_dash="dot", line_color=GREY, opacity=1, **place)
    legend_line(figure, "λ = 1, no change", {"color": GREY, "width": 1.5, "dash": "dot"})
    title_lowest(figure, places, "λ")
    return finish(figure)


def beside_entropy(rows: pd.DataFrame) -> pd.DataFrame:
    """λ of each head in ``value``, the rise of its entropy in ``rise``; no row where one is missing."""
    scales = of(rows, "head_scale", metric="scale", variant="head")
    rise = of(rows, "entropy_rise", metric="entropy_rise")  # beside it stands the entropy itself
    if scales.empty or rise.empty:
        return scales[:0]
    rise = rise.rename(columns={"value": "rise"})[[*KEYS, "rise"]].drop_duplicates(KEYS)
    return scales[[*KEYS, "value"]].merge(rise, on=KEYS)


def _signed(row: Any) -> str:
    value, low, high = (signed_zero(n, ".2f") for n in (row.value, row.low, row.high))
    return f"{value} [{low}, {high}]".replace("-", "−")


def _spread(line: pd.DataFrame, at: str, most: int = 128) -> pd.DataFrame:
    """At most so many rows of a long line, evenly spread on a logarithmic axis."""
    if len(line) <= most:
        return line
    keys = line[at].to_numpy(dtype=float)
    wanted = np.geomspace(max(keys[0], 1.0), keys[-1], most)
    return line.iloc[np.unique(np.searchsorted(keys, wanted).clip(0, len(line) - 1))]
