"""Figures of what lies beyond the trained length: perplexity, passkeys, attention temperatures.

Rows are long, with measurement, encoding, variant (a key of ``VARIANTS``, or any other name) and extension: the factor
by which the variant was made to reach beyond the trained length, NaN where it was made for none.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from probe.report.figures import LAYOUT, colour, interval, interval_bars, plain, some
from probe.report.tables import of

VARIANTS = {
    "none": "no change",
    "uniform": "uniform scale",
    "head": "head scale",
    "search": "head scale, searched",
    "log_length": "scale by ln of the length",
    "linear": "position interpolation",
    "ntk": "NTK-aware",
    "yarn": "YaRN",
    "dropped": "encoding dropped",
    "dropped_uniform": "encoding dropped, scaled",
}
# Okabe and Ito's colours but their yellow, and two of Tol's; marks tell them apart, too.
VARIANT_COLOURS = {
    "none": "#000000",
    "uniform": "#56B4E9",
    "head": "#0072B2",
    "search": "#882255",
    "log_length": "#009E73",
    "linear": "#E69F00",
    "ntk": "#D55E00",
    "yarn": "#CC79A7",
    "dropped": "#7F7F7F",
    "dropped_uniform": "#999933",
}
MARKS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "triangle-down", "pentagon", "hexagon")
SHADES = ["#ffffff", "#6baed6"]  # light enough for the numbers upon them
SPLITS = {"trained": "trained lengths", "longer": "longer sequences"}
TEMPERATURES = {"loss": "loss, nats a token", "exact_match": "exact match"}
PUBLISHED_SLOPE = 0.3973  # Wang et al. 2024
TRAINED = "trained length"
GREY = "#777777"
KEYS = ["encoding", "layer", "head", "extension"]


def perplexity_by_context(rows: pd.DataFrame, train_length: int) -> go.Figure:
    """Perplexity against the context, a panel an encoding, a line a variant, each made for the shortest extension that
    reaches the context; thin lines are those made for other extensions. Bars are intervals over texts.

    Rows: measurement "perplexity", metric "perplexity", encoding, variant, extension, context, value, low, high, n,
    tokens.
    """
    rows = some(of(rows, "perplexity", metric="perplexity"), "perplexity by context")
    said = [f"{told(r.value, r.low, r.high)}, {r.n:.0f} texts, {r.tokens:.0f} tokens each" for r in rows.itertuples()]
    figure = _by_length(rows.assign(said=said), train_length, "context", "context, tokens")
    figure.update_yaxes(type="log", **_decades(rows["value"]))
    return _titled(figure, "perplexity")


def loss_by_position(rows: pd.DataFrame, train_length: int) -> go.Figure:
    """The loss of a token against its position, a panel an encoding, lines as in ``perplexity_by_context``; bands are
    intervals over texts.

    Rows: measurement "loss_by_position", encoding, variant, extension, position (above 0), value, low, high.
    """
    rows = some(of(rows, "loss_by_position"), "loss by position")
    rows = some(rows[rows["position"] > 0], "loss by position")
    said = [interval(r.value, r.low, r.high) + " nats" for r in rows.itertuples()]
    figure = _by_length(rows.assign(said=said), train_length, "position", "position, tokens", bands=True)
    return _titled(figure, "loss, nats a token")


def passkey_by_length(rows: pd.DataFrame, train_length: int) -> go.Figure:
    """The share of keys that are said right against the length, all depths together, a panel an encoding, lines as in
    ``perplexity_by_context``. Bars are Wilson intervals over prompts.

    Rows: measurement "passkey", metric "exact_match", depth missing, encoding, variant, extension, length, value, low,
    high, n.
    """
    rows = some(over_depths(rows), "passkeys by length")
    said = [f"{interval(r.value, r.low, r.high)}, {r.n:.0f} prompts" for r in rows.itertuples()]
    figure = _by_length(rows.assign(said=said), train_length, "length", "length, tokens")
    figure.update_yaxes(range=[-0.03, 1.05])
    return _titled(figure, "exact match")


def passkey_map(rows: pd.DataFrame, train_length: int) -> go.Figure:
    """The share of keys that are said right, length × depth, a row of panels an encoding, a panel a variant, each made
    for the shortest extension that reaches the length. Right of the upright line lies what is beyond the trained one.

    Rows: measurement "passkey", metric "exact_match", encoding, variant, extension, length, depth, value, low, high, n.
    """
    rows = of(rows, "passkey", metric="exact_match")
    rows = some(rows[rows["depth"].notna()] if "depth" in rows else rows[:0], "passkeys by length and depth")
    rows = matched(rows, train_length, "length", "depth")
    rows["said"] = [
        f"{interval(r.value, r.low, r.high)}, {r.n:.0f} prompts{_made_for(r.extension)}" for r in rows.itertuples()
    ]
    groups = [
        [(encoding, variant) for variant in ordered(part["variant"])]
        for encoding, part in rows.groupby("encoding", sort=False)
    ]
    titles = [[f"{plain(encoding)}<br>{label(variant)}" for encoding, variant in group] for group in groups]
    lengths, depths = sorted(set(rows["length"])), sorted(set(rows["depth"]))
    figure, places = _panels(titles, most=5, height=60 + 24 * len(depths), gap=90, right=70, top=65)
    beyond = sum(n <= train_length for n in lengths) - 0.5
    for place, (encoding, variant) in zip(places, [pair for group in groups for pair in group], strict=True):
        part = rows[(rows["encoding"] == encoding) & (rows["variant"] == variant)]
        grid = {
            name: part.pivot(index="depth", columns="length", values=name).reindex(index=depths, columns=lengths)
            for name in ("value", "said")
        }
        figure.add_heatmap(
            z=grid["value"].to_numpy(dtype=float),
            x=[_multiple(n, train_length) for n in lengths],
            y=[_depth(depth) for depth in depths],
            customdata=grid["said"].fillna("").to_numpy(),
            texttemplate="%{z:.2f}",
            textfont={"size": 11},
            hovertemplate="length %{x}, depth %{y}: %{customdata}<extra></extra>",
            hoverongaps=False,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            **place,
        )
        if -0.5 < beyond < len(lengths) - 0.5:
            figure.add_vline(x=beyond, line_width=3, line_color="#D55E00", opacity=1, **place)
    figure.update_xaxes(type="category", tickangle=0, tickfont_size=11)
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_yaxes(title="depth", col=1)
    _title_lowest(figure, places, "length, tokens")
    scale = {"colorscale": SHADES, "cmin": 0, "cmax": 1, "colorbar": _bar("exact<br>match", figure)}
    return figure.update_layout(coloraxis=scale)


def scale_map(rows: pd.DataFrame) -> go.Figure:
    """λ of every head, layer × head, a panel an encoding and extension.

    Rows: measurement "head_scale", metric "scale", variant "head", encoding, layer, head, extension, value.
    """
    rows = some(of(rows, "head_scale", metric="scale", variant="head"), "the scales of heads")
    panels = list(rows.groupby(["encoding", "extension"], sort=False))
    n_heads, n_layers = rows["head"].nunique(), rows["layer"].nunique()
    groups = [
        [f"{plain(e)}, made for {extension:g}×" for (e, extension), _ in panels if e == encoding]
        for encoding in dict.fromkeys(rows["encoding"])
    ]
    # A cell has to hold its number.
    figure, places = _panels(
        groups,
        most=min(4, max(1, 26 // n_heads)),
        height=30 + 30 * n_layers,
        gap=75,
        right=70,
        shared_yaxes=False,
        beside=0.05,
    )
    for place, (_, part) in zip(places, panels, strict=True):
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
    _title_lowest(figure, places, "head")
    most = max(float(rows["value"].max()), 1.01)
    scale = {"colorscale": SHADES, "cmin": 1, "cmax": most, "colorbar": _bar("λ", figure)}
    return figure.update_layout(coloraxis=scale)


def scale_law(rows: pd.DataFrame) -> go.Figure:
    """The scales found against the extension s they were made for, a panel an encoding, under the fitted law
    1 + a ln s. Thin bars span the heads, least to most; bands are intervals of a. Dashed: the published law.

    Rows: measurement "head_scale", metric "scale", encoding, variant, extension, value (a row a head); and measurement
    "scale_law", encoding, variant, metric ("slope", with value, low, high; "r2").
    """
    points = some(of(rows, "head_scale", metric="scale"), "scales by extension")
    points = some(points[points["extension"].notna()], "scales by extension")
    laws = of(rows, "scale_law")
    encodings = list(dict.fromkeys(points["encoding"]))
    extensions = sorted(set(points["extension"].astype(float)))
    s = np.geomspace(1, max(*extensions, 2), 60)
    variants = ordered(points["variant"])
    figure, places = _panels([[plain(e) for e in encodings]], most=3, height=300, legend=len(encodings) * len(variants))
    for place, encoding in zip(places, encodings, strict=True):
        first = place == places[0]
        figure.add_scatter(
            x=s, y=1 + PUBLISHED_SLOPE * np.log(s), mode="lines", name=f"published: 1 + {PUBLISHED_SLOPE} ln s",
            legendgroup="published", showlegend=first, line={"color": GREY, "dash": "dash"}, hoverinfo="skip", **place,
        )  # fmt: skip
        for i, variant in enumerate(variants):
            part = points[(points["encoding"] == encoding) & (points["variant"] == variant)]
            if part.empty:
                continue
            stroke, group = stroke_of(variant), f"{encoding} {variant}"
            law = laws[(laws["encoding"] == encoding) & (laws["variant"] == variant)].set_index("metric")
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
    _title_lowest(figure, places, "extension s")
    return _titled(figure, "λ")


def entropy_by_position(rows: pd.DataFrame, train_length: int) -> go.Figure:
    """The entropy of attention against the number of keys, rows of panels an encoding, a panel a layer: the mean over
    heads, a line a variant, made for its longest extension; thin lines are the heads of the unchanged model. Dotted:
    the entropy of uniform attention, ln(query + 1).

    Rows: measurement "scaled_entropy", metric "entropy", encoding, variant, extension, layer, head, query, value.
    """
    rows = some(of(rows, "scaled_entropy", metric="entropy"), "entropy by position")
    longest = rows.groupby(["encoding", "variant"])["extension"].transform("max")
    rows = rows[rows["extension"].isna() | (rows["extension"] == longest)]
    rows = rows.assign(keys=rows["query"].astype(float) + 1)
    encodings = list(dict.fromkeys(rows["encoding"]))
    layers = sorted(set(rows["layer"].astype(int)))
    variants = ordered(rows["variant"])
    figure, places = _panels(
        [[f"{plain(e)}, layer {layer}" for layer in layers] for e in encodings],
        most=4, height=210, gap=75, legend=len(variants) + 3,
    )  # fmt: skip
    shown: set[str] = set()
    heads, bound = "its single heads", "uniform attention, ln(query + 1)"
    for place, (encoding, layer) in zip(places, [(e, n) for e in encodings for n in layers], strict=True):
        panel = rows[(rows["encoding"] == encoding) & (rows["layer"] == layer)]
        if panel.empty:
            continue
        for _, line in panel[panel["variant"] == "none"].groupby("head"):
            line = _spread(line.sort_values("keys"), "keys")
            figure.add_scatter(
                x=line["keys"], y=line["value"], mode="lines", name=f"{label('none')}: {heads}", legendgroup=heads,
                showlegend=_first(heads, shown), line={"color": "#000000", "width": 0.7}, opacity=0.3, hoverinfo="skip",
                **place,
            )  # fmt: skip
        for variant in variants:
            part = panel[panel["variant"] == variant]
            if part.empty:
                continue
            name = label(variant) + _made_for(part["extension"].iloc[0])
            line = _spread(part.groupby("keys", as_index=False)["value"].mean(), "keys")
            figure.add_scatter(
                x=line["keys"], y=line["value"], mode="lines", name=name, legendgroup=name,
                showlegend=_first(name, shown), line={"color": stroke_of(variant), "width": 2},
                hovertemplate="%{x} keys: %{y:.3f} nats<extra>" + name + "</extra>", **place,
            )  # fmt: skip
        x = _spread(pd.DataFrame({"keys": sorted(set(panel["keys"]))}), "keys")["keys"].tolist()
        figure.add_scatter(
            x=x, y=[math.log(keys) for keys in x], mode="lines", name=bound, legendgroup=bound,
            showlegend=_first(bound, shown), line={"color": GREY, "dash": "dot", "width": 1.2}, hoverinfo="skip",
            **place,
        )  # fmt: skip
    _mark_trained(figure, places, train_length)
    ticks = _position_ticks(train_length, float(rows["keys"].max()), float(rows["keys"].min()), fewer=True)
    figure.update_xaxes(type="log", **ticks, tickangle=0, tickfont_size=11)
    _title_lowest(figure, places, "keys, query + 1")
    return _titled(figure, "entropy, nats")


def scale_against_entropy(rows: pd.DataFrame) -> go.Figure:
    """λ of every head against the rise of its entropy beyond the trained length, a panel an encoding and extension, a
    mark a layer; the title says how they correlate over heads.

    Rows: measurement "head_scale", metric "scale", variant "head"; measurement "entropy_rise", value in nats; both with
    encoding, layer, head, extension; and measurement "scale_entropy" with encoding, variant "head", extension, metric
    ("spearman"), value, low, high.
    """
    joined = some(beside_entropy(rows), "scales of heads beside the rise of their entropy")
    found = of(rows, "scale_entropy", metric="spearman", variant="head")
    found = {(r.encoding, r.extension): f"Spearman {_signed(r)}" for r in found.itertuples()}
    panels = list(joined.groupby(["encoding", "extension"], sort=False))
    titles = [f"{plain(e)}, {extension:g}×<br>{found.get((e, extension), '')}" for (e, extension), _ in panels]
    layers = sorted(set(joined["layer"].astype(int)))
    figure, places = _panels([titles], most=3, height=280, gap=95, legend=len(layers), top=70)
    shades = sample_colorscale("Viridis", np.linspace(0, 0.9, len(layers)).tolist())
    shown: set[str] = set()
    for place, (_, part) in zip(places, panels, strict=True):
        for i, layer in enumerate(layers):
            of_layer = part[part["layer"] == layer]
            figure.add_scatter(
                x=of_layer["rise"].tolist(), y=of_layer["value"].tolist(), mode="markers", name=f"layer {layer}",
                legendgroup=str(layer), showlegend=len(of_layer) > 0 and _first(str(layer), shown),
                marker={"color": shades[i], "symbol": MARKS[i % len(MARKS)], "size": 9},
                customdata=[f"layer {layer}, head {int(head)}" for head in of_layer["head"]],
                hovertemplate="%{customdata}: λ %{y:.3f}, rise %{x:.3f} nats<extra></extra>", **place,
            )  # fmt: skip
    _title_lowest(figure, places, "rise of the head's entropy, nats")
    return _titled(figure, "λ")


def temperature(rows: pd.DataFrame) -> go.Figure:
    """Loss and exact match against a uniform λ, on trained lengths and on longer ones, a line an encoding, bars over
    sequences. λ = 1 is the model as it is.

    Rows: measurement "temperature", encoding, split, scale, metric ("loss", "exact_match"), value, low, high.
    """
    rows = some(of(rows, "temperature"), "temperatures")
    rows = some(rows[rows["metric"].isin(list(TEMPERATURES))], "temperatures")
    splits = [s for s in SPLITS if (rows["split"] == s).any()]
    splits += [s for s in dict.fromkeys(rows["split"]) if s not in SPLITS]
    encodings = list(dict.fromkeys(rows["encoding"]))
    titles = [[f"{plain(SPLITS.get(split, split))}: {what}" for what in TEMPERATURES.values()] for split in splits]
    figure, places = _panels(
        titles, most=2, height=250, gap=65, legend=len(encodings) + 1, shared_yaxes=False, beside=0.09
    )
    shown: set[str] = set()
    step = float(np.diff(sorted(set(rows["scale"]))).min()) if rows["scale"].nunique() > 1 else 0.0
    for place, (split, metric) in zip(places, [(s, m) for s in splits for m in TEMPERATURES], strict=True):
        for i, encoding in enumerate(encodings):
            line = rows[(rows["split"] == split) & (rows["metric"] == metric) & (rows["encoding"] == encoding)]
            if line.empty:
                continue
            line = line.sort_values("scale")
            figure.add_scatter(
                x=[scale + 0.06 * step * (i - (len(encodings) - 1) / 2) for scale in line["scale"]],
                y=line["value"].tolist(),
                mode="lines+markers",
                name=plain(encoding),
                legendgroup=encoding,
                showlegend=_first(encoding, shown),
                line={"color": colour(encoding)},
                marker={"symbol": MARKS[i % len(MARKS)]},
                error_y=interval_bars(line),
                customdata=[f"λ {r.scale:g}: {interval(r.value, r.low, r.high)}" for r in line.itertuples()],
                hovertemplate="%{customdata}<extra>" + plain(encoding) + "</extra>",
                **place,
            )
        figure.update_yaxes(title=TEMPERATURES[metric], **place)
        if metric == "exact_match":
            figure.update_yaxes(range=[-0.03, 1.05], **place)
        figure.add_vline(x=1, line_width=1.5, line_dash="dot", line_color=GREY, opacity=1, **place)
    _legend_line(figure, "λ = 1, no change", {"color": GREY, "width": 1.5, "dash": "dot"})
    _title_lowest(figure, places, "λ")
    return figure


def matched(rows: pd.DataFrame, train_length: int, at: str, *other: str) -> pd.DataFrame:
    """Of each variant, at each length in column ``at``, the row made for the shortest extension that reaches it; rows
    without an extension as they are. Where none reaches that far there is no row."""
    length = rows[at].astype(float) + (at == "position")  # the token at position p sees p + 1
    extension = rows["extension"].astype(float)
    fits = rows[extension.isna() | (extension * (1 + 1e-9) >= length / train_length)]
    by = ["encoding", "variant", at, *other]
    return fits.sort_values("extension", kind="stable").drop_duplicates(by).sort_index()


def over_depths(rows: pd.DataFrame) -> pd.DataFrame:
    """Shares of keys said right, all depths together."""
    rows = of(rows, "passkey", metric="exact_match")
    return rows[rows["depth"].isna()] if "depth" in rows else rows


def beside_entropy(rows: pd.DataFrame) -> pd.DataFrame:
    """λ of each head in ``value``, the rise of its entropy in ``rise``; no row where one is missing."""
    scales, rise = of(rows, "head_scale", metric="scale", variant="head"), of(rows, "entropy_rise")
    if scales.empty or rise.empty:
        return scales[:0]
    rise = rise.rename(columns={"value": "rise"})[[*KEYS, "rise"]].drop_duplicates(KEYS)
    return scales[[*KEYS, "value"]].merge(rise, on=KEYS)


def ordered(variants: Iterable[str]) -> list[str]:
    """Each variant once, known ones first."""
    there = list(dict.fromkeys(variants))
    return [v for v in VARIANTS if v in there] + [v for v in there if v not in VARIANTS]


def label(variant: str) -> str:
    return plain(VARIANTS.get(variant, variant))


def stroke_of(variant: str) -> str:
    return VARIANT_COLOURS.get(variant) or colour(variant)


def mark_of(variant: str) -> str:
    return MARKS[list(VARIANTS).index(variant)] if variant in VARIANTS else "asterisk-open"


def told(value: float, low: float, high: float) -> str:
    """Numbers of any size and their interval, four digits of each: ``12.31 [12.04, 12.60]``."""
    return f"{_digits(value)} [{_digits(low)}, {_digits(high)}]"


def _digits(value: float) -> str:
    if not math.isfinite(value) or abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:.{max(0, 4 - len(str(int(abs(value)))))}f}"


def _signed(row) -> str:
    return f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]".replace("-", "−")


def _made_for(extension: float) -> str:
    return "" if pd.isna(extension) else f", made for {extension:g}×"


def _multiple(length: float, train_length: int) -> str:
    return f"{length:g}<br>({round(length / train_length, 2):g}×)"


def _depth(depth: float) -> str:
    return {0.0: "0 = start", 1.0: "1 = end"}.get(float(depth), f"{round(float(depth), 2):g}")


def _first(name: str, shown: set[str]) -> bool:
    """Whether a name is new to the legend, which has it from now on."""
    new = name not in shown
    shown.add(name)
    return new


def _by_length(rows: pd.DataFrame, train_length: int, at: str, title: str, *, bands: bool = False) -> go.Figure:
    """Lines of value against ``at``, with what is ``said`` of each point on hovering."""
    rows = rows.reset_index(drop=True)
    encodings, variants = list(dict.fromkeys(rows["encoding"])), ordered(rows["variant"])
    figure, places = _panels([[plain(e) for e in encodings]], most=3, height=330, gap=85, legend=len(variants) + 2)
    shown: set[str] = set()
    fitting = matched(rows, train_length, at).index
    for place, encoding in zip(places, encodings, strict=True):
        panel = rows[rows["encoding"] == encoding]
        there = ordered(panel["variant"])
        for i, variant in enumerate(there):
            part = panel[panel["variant"] == variant].sort_values(at)
            stroke = stroke_of(variant)
            # Bars of one length beside each other.
            dodge = 1.0 if bands else 1.012 ** (i - (len(there) - 1) / 2)
            for extension, line in part.groupby("extension"):
                if not line.index.isin(fitting).all():
                    figure.add_scatter(
                        x=(line[at] * dodge).tolist(), y=line["value"].tolist(), mode="lines", opacity=0.4,
                        line={"color": stroke, "width": 1}, name=f"{label(variant)}{_made_for(extension)}",
                        legendgroup=variant, showlegend=False, customdata=_hover(line, at),
                        hovertemplate=f"%{{customdata}}<extra>{label(variant)}</extra>", **place,
                    )  # fmt: skip
            line = part[part.index.isin(fitting)]
            x = line[at].astype(float).tolist()
            if bands and len(line) and line["low"].notna().all():
                figure.add_scatter(
                    x=x + x[::-1], y=[*line["high"], *line["low"][::-1]], fill="toself", mode="none", opacity=0.2,
                    fillcolor=stroke, hoverinfo="skip", showlegend=False, legendgroup=variant, **place,
                )  # fmt: skip
            figure.add_scatter(
                x=[value * dodge for value in x] or [None],  # in the legend even where only thin lines are
                y=line["value"].tolist() or [None],
                mode="lines" if bands else "lines+markers",
                name=label(variant),
                legendgroup=variant,
                showlegend=_first(variant, shown),
                line={"color": stroke, "width": 2},
                marker={"symbol": mark_of(variant), "size": 8},
                error_y=None if bands else interval_bars(line, width=3),
                customdata=_hover(line, at),
                hovertemplate=f"%{{customdata}}<extra>{label(variant)}</extra>",
                **place,
            )
    if len(fitting) < len(rows):
        _legend_line(figure, "made for another length", {"color": GREY, "width": 1})
    _mark_trained(figure, places, train_length)
    if at == "position":
        ticks = _position_ticks(train_length, float(rows[at].max()), float(rows[at].min()))
    else:
        lengths = sorted(set(rows[at].astype(int)))
        ticks = {"tickvals": lengths, "ticktext": [_multiple(n, train_length) for n in lengths]}
    figure.update_xaxes(type="log", tickangle=0, **ticks)
    _title_lowest(figure, places, title)
    return figure


def _hover(line: pd.DataFrame, at: str) -> list[str]:
    return [
        f"{at} {length:g}: {said}{_made_for(extension)}"
        for length, said, extension in zip(line[at], line["said"], line["extension"], strict=True)
    ]


def _decades(values: pd.Series) -> dict:
    """Ticks at 1, 2, 5, 10, … where plotly would name every digit."""
    values = values[np.isfinite(values.astype(float)) & (values > 0)]
    if values.empty or values.max() < 4 * values.min():
        return {}
    exponents = range(math.floor(math.log10(values.min())), math.ceil(math.log10(values.max())) + 1)
    ticks = [digit * 10.0**k for k in exponents for digit in ((1, 2, 5) if len(exponents) < 6 else (1,))]
    return {"tickvals": ticks, "ticktext": [f"{t:,.0f}" if 1 <= t < 1e6 else f"{t:.0e}" for t in ticks]}


def _position_ticks(train_length: int, last: float, first: float = 1.0, *, fewer: bool = False) -> dict:
    """The trained length and its doublings; powers of 4, or of 16, below it."""
    first = max(first, 1.0)
    below = [float(n) for n in (16 if fewer else 4) ** np.arange(12.0) if first <= n < train_length / 1.5]
    above = [train_length * 2.0**k for k in range(24) if train_length * 2.0**k <= 1.05 * last]
    above = above[:: 2 if fewer and len(above) > 2 else 1]
    return {
        "tickvals": [*below, *above],
        "ticktext": [*(f"{n:g}" for n in below), *(_multiple(n, train_length) for n in above)],
        "range": [math.log10(first), math.log10(1.05 * max(last, first + 1))],
    }


def _spread(line: pd.DataFrame, at: str, most: int = 128) -> pd.DataFrame:
    """At most so many rows of a long line, evenly spread on a logarithmic axis."""
    if len(line) <= most:
        return line
    keys = line[at].to_numpy(dtype=float)
    wanted = np.geomspace(max(keys[0], 1.0), keys[-1], most)
    return line.iloc[np.unique(np.searchsorted(keys, wanted).clip(0, len(line) - 1))]


def _panels(
    groups: Sequence[Sequence[str]], *, most: int, height: int, gap: int = 70, legend: int = 0, right: int = 20,
    top: int = 50, shared_yaxes: str | bool = "all", beside: float = 0.03,
) -> tuple[go.Figure, list[dict[str, int]]]:  # fmt: skip
    """Panels with titles, and the place of each. Every group begins a row, and a row holds at most so many.

    ``height`` of a panel, ``gap`` between rows, ``right`` and ``top`` are pixels; ``legend`` is the number of entries,
    ``beside``, between columns, a share of the width.
    """
    n_columns = min(most, max(map(len, groups)))
    lines = [group[i : i + n_columns] for group in groups for i in range(0, len(group), n_columns)]
    drawn = len(lines) * height + (len(lines) - 1) * gap
    figure = make_subplots(
        rows=len(lines),
        cols=n_columns,
        specs=[[{} if column < len(line) else None for column in range(n_columns)] for line in lines],
        subplot_titles=[title for line in lines for title in line],
        shared_yaxes=shared_yaxes,
        horizontal_spacing=beside,
        vertical_spacing=gap / drawn if len(lines) > 1 else 0,
    )
    figure.update_annotations(font_size=13)
    below = 68  # ticks of two lines, and the title
    margin = {"l": 75, "r": right, "t": top, "b": below + 24 * -(-legend // 4)}
    figure.update_layout(
        **LAYOUT | {"margin": margin},
        height=drawn + margin["t"] + margin["b"],
        legend={"orientation": "h", "y": -below / drawn, "yanchor": "top"},
    )
    return figure, [{"row": r, "col": c} for r, line in enumerate(lines, 1) for c, _ in enumerate(line, 1)]


def _bar(title: str, figure: go.Figure) -> dict:
    """A colour bar of at most 300 pixels beside the top panels."""
    drawn = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    return {"title": title, "lenmode": "pixels", "len": min(300, drawn), "y": 1, "yanchor": "top"}


def _titled(figure: go.Figure, title: str) -> go.Figure:
    """The same title on the vertical axes of the first column."""
    figure.update_yaxes(title=title, col=1)
    return figure


def _title_lowest(figure: go.Figure, places: Sequence[dict[str, int]], title: str) -> None:
    """A title below each panel that has none below it."""
    for place in places:
        if {"row": place["row"] + 1, "col": place["col"]} not in places:
            figure.update_xaxes(title=title, title_standoff=8, **place)


def _mark_trained(figure: go.Figure, places: Sequence[dict[str, int]], train_length: int) -> None:
    """A dotted line at the trained length in every panel, named in the legend."""
    for place in places:
        figure.add_vline(x=train_length, line_width=1.5, line_dash="dot", line_color="#D55E00", opacity=0.8, **place)
    _legend_line(figure, TRAINED, {"color": "#D55E00", "width": 1.5, "dash": "dot"})


def _legend_line(figure: go.Figure, name: str, line: dict) -> None:
    figure.add_scatter(x=[None], y=[None], mode="lines", name=name, legendgroup=name, line=line, row=1, col=1)
