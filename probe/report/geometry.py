"""Figures of the geometry of position, of the evidence for its mechanisms, and of when it appears."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probe.report.figures import (
    CONTROL_LABELS,
    DASHES,
    LAYOUT,
    colour,
    interval,
    interval_bars,
    plain,
    short_site,
    some,
)

PART_COLOURS = {"position": "#0072B2", "context": "#E69F00", "token": "#CCCCCC", "residual": "#EEEEEE"}
CONTROL_COLOURS = {"none": "#0072B2", "untrained": "#777777", "shuffled": "#BBBBBB"}
SIMILARITY_LABELS = {"hidden": "hidden states", "position_mean": "position means"}
VERDICT_COLOURS = {"used": "#D55E00", "available": "#0072B2", "nothing": "#999999"}
LOWEST = -1.0  # the least R² that is drawn: one that is worse than the mean position says no more


def variance_shares(rows: pd.DataFrame) -> go.Figure:
    """What share of the variance of hidden states position, context and token have: a bar a site, a panel a control;
    the dimension of pos_t (participation ratio) stands above.

    Rows: ``decompose_hidden(…).shares``: site, control, metric, value, low, high.
    """
    rows = some(rows, "shares of variance")
    controls = list(dict.fromkeys(rows["control"]))
    figure = make_subplots(cols=len(controls), shared_yaxes=True, horizontal_spacing=0.02,
                           subplot_titles=[CONTROL_LABELS.get(c, c) for c in controls])  # fmt: skip
    for column, control in enumerate(controls, start=1):
        of = rows[rows["control"] == control]
        for part, fill in PART_COLOURS.items():
            bars = of[of["metric"] == f"share_{part}"]
            figure.add_bar(
                x=[plain(short_site(s)) for s in bars["site"]],
                y=bars["value"].tolist(),
                name=part,
                legendgroup=part,
                showlegend=column == 1,
                marker={"color": fill, "line": {"color": "#888888", "width": 0.5}},
                customdata=[f"{r.value:.4f} [{r.low:.4f}, {r.high:.4f}]" for r in bars.itertuples()],
                hovertemplate="%{x}: %{customdata}<extra>" + part + "</extra>",
                row=1,
                col=column,
            )
        for r in of[of["metric"] == "participation_ratio"].itertuples():
            figure.add_annotation(x=plain(short_site(r.site)), y=1.0, yshift=9, text=f"{r.value:.1f} d",
                                  showarrow=False, font_size=11, row=1, col=column)  # fmt: skip
    figure.update_xaxes(tickangle=-35)
    figure.update_yaxes(range=[0, 1.08], tickvals=[0, 0.25, 0.5, 0.75, 1])
    figure.update_yaxes(title="share of variance", col=1)
    figure.update_layout(**LAYOUT, barmode="stack", height=440, legend={"orientation": "h", "y": -0.32})
    return _raised_titles(figure)


def position_basis(rows: pd.DataFrame) -> go.Figure:
    """pos_t along its principal components, against t, a panel a site; untrained models dashed.

    Rows: ``decompose_hidden(…).basis``: site, control, component, share, position, value.
    """
    rows = some(rows, "principal components of position")
    sites = list(dict.fromkeys(rows["site"]))
    figure = _panels(sites)
    shades = ("#08306b", "#4292c6", "#a6bddb", "#d0d1e6")
    for panel, site in enumerate(sites):
        at = _at(panel)
        for (control, component), line in rows[rows["site"] == site].groupby(["control", "component"], sort=False):
            share = line["share"].iloc[0]
            name = f"component {component + 1}" + ("" if control == "none" else f", {CONTROL_LABELS[control]}")
            figure.add_scatter(
                x=line["position"].tolist(), y=line["value"].tolist(), mode="lines", name=name, legendgroup=name,
                showlegend=panel == 0, **at,
                line={"color": shades[min(component, 3)], "dash": DASHES.get(control, "dash"), "width": 2},
                hovertemplate=f"position %{{x}}: %{{y:.3f}}<extra>{name}: {share:.1%} of pos_t</extra>",
            )  # fmt: skip
    figure.update_xaxes(title="position")
    figure.update_yaxes(title="pos_t along it", col=1)
    return _sized(figure, len(sites))


def similarity_by_lag(rows: pd.DataFrame, metric: str = "hidden") -> go.Figure:
    """Cosine similarity of hidden states (or, "position_mean", of the means at their positions) against the distance
    between them, a panel a site, beside its controls, intervals as bands.

    Rows: ``neighbour_similarity``: site, control, lag, metric, value, low, high.
    """
    rows = some(rows[rows["metric"] == metric], f"similarities {metric!r}")
    sites = list(dict.fromkeys(rows["site"]))
    figure = _panels(sites)
    for panel, site in enumerate(sites):
        for control, line in rows[rows["site"] == site].groupby("control", sort=False):
            _banded(figure, line.sort_values("lag"), "lag", control, panel)
    figure.update_xaxes(title="tokens apart")
    label = SIMILARITY_LABELS.get(metric, metric)
    figure.update_yaxes(title=f"cosine of {label}", col=1)
    return _sized(figure, len(sites))


def variance_against_position(rows: pd.DataFrame) -> go.Figure:
    """The variance of attention outputs against the number of keys, both axes logarithmic, over the fitted power law,
    a panel a site (or head).

    Rows: ``variance_by_position``: site, head, control, position, metric, value, low, high.
    """
    rows = some(rows, "variances by position")
    panels = list(rows.groupby(["site", "head"], sort=False, dropna=False))
    names = [site if pd.isna(head) else f"{site}[{head}]" for (site, head), _ in panels]
    figure = _panels(names)
    for panel, (_, of) in enumerate(panels):
        powers = []
        for control, part in of.groupby("control", sort=False):
            line = part[(part["metric"] == "variance") & (part["value"] > 0)].sort_values("position")
            fit = part[part["metric"] == "exponent"].iloc[0]
            if line.empty:
                continue
            line = line.assign(keys=line["position"].astype(int) + 1)
            line["low"] = line["low"].clip(lower=line["value"] / 100)  # 0 has no place on a logarithmic axis
            _banded(figure, line, "keys", control, panel)
            log_t, log_v = np.log(line["keys"].to_numpy(dtype=float)), np.log(line["value"].to_numpy(dtype=float))
            fitted = np.exp(log_v.mean() - fit["value"] * (log_t - log_t.mean()))
            figure.add_scatter(x=line["keys"].tolist(), y=fitted.tolist(), mode="lines", showlegend=False,
                               line={"color": "#D55E00", "dash": "dot", "width": 1.5}, hoverinfo="skip",
                               **_at(panel))  # fmt: skip
            told = f"t<sup>{-fit['value']:.2f}</sup>".replace("-", "−")
            powers.append(told if control == "none" else f"{control} {told}")
        # make_subplots has made the titles in the order of the panels.
        figure.layout.annotations[panel].text += ": " + ", ".join(powers) if powers else ""
    ticks = [m * 10**e for e in range(7) for m in (1, 2, 5)]
    figure.update_xaxes(type="log", title="keys seen, t", tickvals=ticks)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    figure.update_annotations(font_size=12)
    figure.update_yaxes(title="variance", col=1)
    return _sized(figure, len(panels))


def channel_correlations(rows: pd.DataFrame) -> go.Figure:
    """The coordinates that go with position most: the size of Spearman's ρ by rank, beside the controls' best ones, a
    panel a site; the channel's number stands at its point.

    Rows: ``position_channels``: site, control, rank, channel, metric, value, low, high.
    """
    rows = some(rows[rows["metric"] == "spearman"], "channels")
    sites = list(dict.fromkeys(rows["site"]))
    figure = _panels(sites)
    for panel, site in enumerate(sites):
        for control, line in rows[rows["site"] == site].groupby("control", sort=False):
            line, size = line.sort_values("rank"), line.sort_values("rank")["value"].abs()
            sign = np.sign(line["value"]).replace(0, 1)
            ends = np.stack([line["low"] * sign, line["high"] * sign])
            name = CONTROL_LABELS.get(control, control)
            own = control == "none"
            figure.add_scatter(
                x=(line["rank"] + 1).tolist(), y=size.tolist(), name=name, legendgroup=control,
                showlegend=panel == 0, mode="markers+text" if own else "markers",
                marker={"color": CONTROL_COLOURS.get(control, "#777777"), "size": 8},
                text=line["channel"].astype(str).tolist() if own else None, textposition="top center",
                textfont={"size": 10},
                error_y={"type": "data", "symmetric": False, "thickness": 1, "width": 2,
                         "array": (ends.max(0) - size).tolist(), "arrayminus": (size - ends.min(0)).tolist()},
                customdata=[f"channel {r.channel}: ρ = {r.value:.3f}" for r in line.itertuples()],
                hovertemplate="%{customdata}<extra>" + name + "</extra>", **_at(panel),
            )  # fmt: skip
    figure.update_xaxes(title="rank", dtick=1)
    figure.update_yaxes(range=[-0.03, 1.09])
    figure.update_yaxes(title="|ρ| with position", col=1)
    return _sized(figure, len(sites))


def mechanism_readouts(rows: pd.DataFrame) -> go.Figure:
    """How well position is decoded under each intervention, by the probe that was fitted on normal sequences and by one
    fitted anew; below it, the verdicts. What is worse than R² = -1 is drawn there.

    Rows: ``name_mechanism``: mechanism, verdict, intervention, site, metric, value, low, high.
    """
    rows = some(rows, "mechanisms")
    read = rows[(rows["mechanism"] == "position") & (rows["site"] != "hook_embed")]
    names = list(dict.fromkeys(read["intervention"]))[::-1]
    figure = go.Figure()
    for metric, label, symbol, stroke in (
        ("r2_refitted", "fitted under the intervention", "circle-open", "#777777"),
        ("r2", "fitted on normal sequences", "circle", "#0072B2"),
    ):
        points = read[read["metric"] == metric].set_index("intervention").loc[names]
        shown = points[["value", "low", "high"]].clip(lower=LOWEST)
        figure.add_scatter(
            x=shown["value"].tolist(), y=[plain(n.replace("_", " ")) for n in names], mode="markers", name=label,
            marker={"color": stroke, "size": 9, "symbol": symbol},
            error_x={"type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
                     "array": (shown["high"] - shown["value"]).tolist(),
                     "arrayminus": (shown["value"] - shown["low"]).tolist()},
            customdata=[interval(r.value, r.low, r.high) for r in points.itertuples()],
            hovertemplate="%{y}: R² %{customdata}<extra>" + label + "</extra>",
        )  # fmt: skip
    figure.add_vline(x=0, line_width=1, line_color="#999999")
    verdicts = rows.drop_duplicates("mechanism")
    told = " · ".join(
        f"{r.mechanism.replace('_', ' ')}: <b style='color:{VERDICT_COLOURS[r.verdict]}'>{r.verdict}</b>"
        for r in verdicts.itertuples()
    )
    figure.add_annotation(text=told, x=0, xref="paper", xanchor="left", y=1, yref="paper", yanchor="bottom", yshift=12,
                          showarrow=False, font_size=12)  # fmt: skip
    figure.update_xaxes(title="R² of the decoded position", range=[LOWEST - 0.06, 1.06])
    layout = LAYOUT | {"margin": LAYOUT["margin"] | {"l": 170}}
    return figure.update_layout(**layout, height=150 + 26 * len(names), legend={"orientation": "h", "y": -0.2})


def position_against_loss(rows: pd.DataFrame) -> go.Figure:
    """A probe's score at each site above the loss, against the training step, with intervals.

    Rows: ``probe_over_training``: step, site, metric, value, low, high; one metric beside "loss".
    """
    rows = some(rows, "a probe over training")
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.07, row_heights=[0.6, 0.4])
    scores = rows[rows["metric"] != "loss"]
    shades = ("#9ecae1", "#4292c6", "#2171b5", "#08306b")
    sites = list(dict.fromkeys(scores["site"]))
    lines = [(s, scores[scores["site"] == s], shades[4 * i // len(sites)], 1) for i, s in enumerate(sites)]
    for name, line, stroke, row in [*lines, ("loss", rows[rows["metric"] == "loss"], "#D55E00", 2)]:
        line = line.sort_values("step")
        label = plain(short_site(name))
        figure.add_scatter(
            x=line["step"].tolist(), y=line["value"].tolist(), mode="lines+markers", name=label, row=row, col=1,
            line={"color": stroke}, marker={"size": 5},
            error_y=interval_bars(line),
            hovertemplate="step %{x}: %{y:.3f}<extra>" + label + "</extra>",
        )  # fmt: skip
    metric = ", ".join(dict.fromkeys(scores["metric"])).replace("r2", "R²")
    figure.update_yaxes(title=f"{metric} of position", row=1, col=1)
    figure.update_yaxes(title="loss (nats)", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(title="training step", row=2, col=1)
    return figure.update_layout(**LAYOUT, height=480)


def _panels(names: list[str], width: int = 4) -> go.Figure:
    """Panels for sites, at most so many beside each other, sharing the y axis."""
    n_rows = -(-len(names) // width)
    return make_subplots(
        rows=n_rows,
        cols=min(width, len(names)),
        shared_yaxes="all",
        horizontal_spacing=0.025,
        vertical_spacing=0.4 / n_rows,
        subplot_titles=[plain(short_site(n)) for n in names],
    )


def _at(panel: int, width: int = 4) -> dict[str, int]:
    return {"row": panel // width + 1, "col": panel % width + 1}


def _sized(figure: go.Figure, n_panels: int, width: int = 4) -> go.Figure:
    n_rows = -(-n_panels // width)
    height = 120 + 280 * n_rows
    figure.update_layout(**LAYOUT, height=height, legend={"orientation": "h", "y": -75 / height})
    return figure


def _raised_titles(figure: go.Figure) -> go.Figure:
    """Above the labels that stand on the bars."""
    for title in figure.layout.annotations:
        if title.yref == "paper":
            title.yshift = 8
    return figure


def _banded(figure: go.Figure, line: pd.DataFrame, along: str, control: str, panel: int) -> None:
    """A line with its interval as a band."""
    x, name = line[along].astype(int).tolist(), CONTROL_LABELS.get(control, control)
    stroke = CONTROL_COLOURS.get(control) or colour(control)
    figure.add_scatter(
        x=x + x[::-1], y=[*line["high"], *line["low"][::-1]], fill="toself", mode="none", opacity=0.2,
        fillcolor=stroke, hoverinfo="skip", showlegend=False, legendgroup=control, **_at(panel),
    )  # fmt: skip
    figure.add_scatter(
        x=x, y=line["value"].tolist(), mode="lines", name=name, legendgroup=control, showlegend=panel == 0,
        line={"color": stroke, "dash": DASHES.get(control, "solid"), "width": 2},
        hovertemplate="%{x}: %{y:.4g}<extra>" + name + "</extra>", **_at(panel),
    )  # fmt: skip
