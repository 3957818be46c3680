"""Figures of the geometry of position, of the evidence for its mechanisms, and of when it appears."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from probe.report.drawing import add_band, counted, interval, interval_bars, plain, short_site, some
from probe.report.style import (
    BLUE,
    CONTROL_LABELS,
    DASHES,
    GREY,
    PALE,
    STRONG,
    colour,
    finish,
    panels,
    title_lowest,
)

PART_COLOURS = {"position": BLUE, "context": "#E69F00", "token": "#CCCCCC", "residual": "#EEEEEE"}
CONTROL_COLOURS = {"none": BLUE, "untrained": GREY, "shuffled": PALE}
SIMILARITY_LABELS = {"hidden": "hidden states", "position_mean": "position means"}
VERDICT_COLOURS = {"used": STRONG, "available": BLUE, "nothing": GREY}
LOWEST = -1.0  # the least R² that is drawn: one that is worse than the mean position says no more


def plot_variance_shares(rows: pd.DataFrame) -> go.Figure:
    """What share of the variance of hidden states position, context and token have: a bar a site, a panel a control;
    the dimension of pos_t (participation ratio) stands above.

    Rows: ``decompose_hidden(…).rows``: site, control, metric, value, low, high.
    """
    rows = some(rows, "shares of variance")
    controls = list(dict.fromkeys(rows["control"]))
    titles = [plain(CONTROL_LABELS.get(c, c)) for c in controls]
    figure, places = panels([titles], height=280, gap=115, beside=0.02)
    for place, control in zip(places, controls, strict=True):
        of = rows[rows["control"] == control]
        for part, fill in PART_COLOURS.items():
            bars = of[of["metric"] == f"share_{part}"]
            figure.add_bar(
                x=[plain(short_site(s)) for s in bars["site"]],
                y=bars["value"].tolist(),
                name=part,
                legendgroup=part,
                showlegend=place == places[0],
                marker={"color": fill, "line": {"color": GREY, "width": 0.5}},
                customdata=[f"{r.value:.4f} [{r.low:.4f}, {r.high:.4f}]" for r in bars.itertuples()],
                hovertemplate="%{x}: %{customdata}<extra>" + part + "</extra>",
                **place,
            )
        for r in of[of["metric"] == "participation_ratio"].itertuples():
            figure.add_annotation(x=plain(short_site(r.site)), y=1.0, yshift=9, text=f"{r.value:.1f} d",
                                  showarrow=False, font_size=11, **place)  # fmt: skip
    figure.update_xaxes(tickangle=-35)
    figure.update_yaxes(range=[0, 1.08], tickvals=[0, 0.25, 0.5, 0.75, 1])
    figure.update_yaxes(title=f"share of variance{counted(rows)}", col=1)
    return finish(_raised_titles(figure), barmode="stack")


def plot_position_basis(rows: pd.DataFrame) -> go.Figure:
    """pos_t along its principal components, against t, a panel a site; untrained models dashed.

    Rows: ``decompose_hidden(…).basis``: site, control, component, share, position, value.
    """
    rows = some(rows, "principal components of position")
    sites = list(dict.fromkeys(rows["site"]))
    figure, places = _sites(sites)
    shades = ("#08306b", "#4292c6", "#a6bddb", "#d0d1e6")
    for place, site in zip(places, sites, strict=True):
        for (control, component), line in rows[rows["site"] == site].groupby(["control", "component"], sort=False):
            share = line["share"].iloc[0]
            name = f"component {component + 1}" + ("" if control == "none" else f", {CONTROL_LABELS[control]}")
            figure.add_scatter(
                x=line["position"].tolist(), y=line["value"].tolist(), mode="lines", name=name, legendgroup=name,
                showlegend=place == places[0], **place,
                line={"color": shades[min(component, 3)], "dash": DASHES.get(control, "dash"), "width": 2},
                hovertemplate=f"position %{{x}}: %{{y:.3f}}<extra>{name}: {share:.1%} of pos_t</extra>",
            )  # fmt: skip
    title_lowest(figure, places, "position, tokens")
    figure.update_yaxes(title="pos_t along it", col=1)
    return finish(figure)


def plot_similarity_by_lag(rows: pd.DataFrame, metric: str = "hidden") -> go.Figure:
    """Cosine similarity of hidden states (or, "position_mean", of the means at their positions) against the distance
    between them, a panel a site, beside its controls, intervals as bands.

    Rows: ``neighbour_similarity``: site, control, lag, metric, value, low, high.
    """
    rows = some(rows[rows["metric"] == metric], f"similarities {metric!r}")
    sites = list(dict.fromkeys(rows["site"]))
    figure, places = _sites(sites)
    for place, site in zip(places, sites, strict=True):
        for control, line in rows[rows["site"] == site].groupby("control", sort=False):
            _banded(figure, line.sort_values("lag"), "lag", control, place, legend=place == places[0])
    title_lowest(figure, places, "tokens apart")
    label = SIMILARITY_LABELS.get(metric, metric)
    figure.update_yaxes(title=f"cosine of {label}{counted(rows)}", col=1)
    return finish(figure)


def plot_variance_against_position(rows: pd.DataFrame) -> go.Figure:
    """The variance of attention outputs against the number of keys, both axes logarithmic, over the fitted power law,
    a panel a site (or head).

    Rows: ``variance_by_position``: site, head, control, position, metric, value, low, high.
    """
    rows = some(rows, "variances by position")
    found = list(rows.groupby(["site", "head"], sort=False, dropna=False))
    names = [site if pd.isna(head) else f"{site}[{head}]" for (site, head), _ in found]
    figure, places = _sites(names)
    for i, (place, (_, of)) in enumerate(zip(places, found, strict=True)):
        powers = []
        for control, part in of.groupby("control", sort=False):
            line = part[(part["metric"] == "variance") & (part["value"] > 0)].sort_values("position")
            fit = part[part["metric"] == "exponent"].iloc[0]
            if line.empty:
                continue
            line = line.assign(keys=line["position"].astype(int) + 1)
            line["low"] = line["low"].clip(lower=line["value"] / 100)  # 0 has no place on a logarithmic axis
            _banded(figure, line, "keys", control, place, legend=i == 0)
            log_t, log_v = np.log(line["keys"].to_numpy(dtype=float)), np.log(line["value"].to_numpy(dtype=float))
            fitted = np.exp(log_v.mean() - fit["value"] * (log_t - log_t.mean()))
            figure.add_scatter(x=line["keys"].tolist(), y=fitted.tolist(), mode="lines", showlegend=False,
                               line={"color": STRONG, "dash": "dot", "width": 1.5}, hoverinfo="skip",
                               **place)  # fmt: skip
            told = f"t<sup>{-fit['value']:.2f}</sup>".replace("-", "−")
            powers.append(told if control == "none" else f"{control} {told}")
        # The titles are in the order of the panels.
        figure.layout.annotations[i].text += "<br>" + ", ".join(powers) if powers else ""
    ticks = [m * 10**e for e in range(7) for m in (1, 2, 5)]
    figure.update_xaxes(type="log", tickvals=ticks)
    variances = rows[(rows["metric"] == "variance") & (rows["value"] > 0)]["value"]
    narrow = variances.max() < 30 * variances.min()
    figure.update_yaxes(type="log", exponentformat="power", dtick="D2" if narrow else 1)
    figure.update_annotations(font_size=12)
    title_lowest(figure, places, "keys seen, t")
    figure.update_yaxes(title=f"variance{counted(rows)}", col=1)
    return finish(figure)


def plot_channel_correlations(rows: pd.DataFrame) -> go.Figure:
    """The coordinates that go with position most: the size of Spearman's ρ by rank, beside the controls' best ones, a
    panel a site; the channel's number stands at its point.

    Rows: ``position_channels``: site, control, rank, channel, metric, value, low, high.
    """
    rows = some(rows[rows["metric"] == "spearman"], "channels")
    sites = list(dict.fromkeys(rows["site"]))
    figure, places = _sites(sites)
    for place, site in zip(places, sites, strict=True):
        for control, line in rows[rows["site"] == site].groupby("control", sort=False):
            line, size = line.sort_values("rank"), line.sort_values("rank")["value"].abs()
            sign = np.sign(line["value"]).replace(0, 1)
            ends = np.stack([line["low"] * sign, line["high"] * sign])
            name = CONTROL_LABELS.get(control, control)
            own = control == "none"
            figure.add_scatter(
                x=(line["rank"] + 1).tolist(), y=size.tolist(), name=name, legendgroup=control,
                showlegend=place == places[0], mode="markers+text" if own else "markers",
                marker={"color": CONTROL_COLOURS.get(control, GREY), "size": 8},
                text=line["channel"].astype(str).tolist() if own else None, textposition="top center",
                textfont={"size": 10},
                error_y={"type": "data", "symmetric": False, "thickness": 1, "width": 2,
                         "array": (ends.max(0) - size).tolist(), "arrayminus": (size - ends.min(0)).tolist()},
                customdata=[f"channel {r.channel}: ρ = {r.value:.3f}" for r in line.itertuples()],
                hovertemplate="%{customdata}<extra>" + name + "</extra>", **place,
            )  # fmt: skip
    title_lowest(figure, places, "rank")
    figure.update_xaxes(dtick=1)
    figure.update_yaxes(range=[-0.03, 1.09])
    figure.update_yaxes(title=f"|ρ| with position{counted(rows)}", col=1)
    return finish(figure)


def plot_mechanism_readouts(rows: pd.DataFrame) -> go.Figure:
    """How well position is decoded under each intervention, by the probe that was fitted on normal sequences and by one
    fitted anew; below it, the verdicts. What is worse than R² = -1 is drawn there.

    Rows: ``name_mechanism``: mechanism, verdict, intervention, site, metric, value, low, high.
    """
    rows = some(rows, "mechanisms")
    read = rows[(rows["mechanism"] == "position") & (rows["site"] != "hook_embed")]
    names = list(dict.fromkeys(read["intervention"]))[::-1]
    verdicts = [
        f"{plain(r.mechanism.replace('_', ' '))}: <b style='color:{VERDICT_COLOURS[r.verdict]}'>{plain(r.verdict)}</b>"
        for r in rows.drop_duplicates("mechanism").itertuples()
    ]
    told = "<br>".join(" · ".join(verdicts[i : i + 3]) for i in range(0, len(verdicts), 3))
    figure, (place,) = panels([[told]], height=30 + 26 * len(names))
    figure.update_annotations(font_size=12)
    for metric, label, symbol, stroke in (
        ("r2_refitted", "fitted under the intervention", "circle-open", GREY),
        ("r2", "fitted on normal sequences", "circle", BLUE),
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
            hovertemplate="%{y}: R² %{customdata}<extra>" + label + "</extra>", **place,
        )  # fmt: skip
    figure.add_vline(x=0, line_width=1, line_color=GREY)
    figure.update_xaxes(title=f"R² of the decoded position{counted(read)}", range=[LOWEST - 0.06, 1.06])
    return finish(figure)


def plot_position_against_loss(rows: pd.DataFrame) -> go.Figure:
    """A probe's score at each site above the loss, against the training step, with intervals.

    Rows: ``probe_over_training``: step, site, metric, value, low, high; one metric beside "loss".
    """
    rows = some(rows, "a probe over training")
    figure, places = panels([[""], [""]], height=180, gap=24, shared_y=False)
    scores = rows[rows["metric"] != "loss"]
    shades = ("#9ecae1", "#4292c6", "#2171b5", "#08306b")
    sites = list(dict.fromkeys(scores["site"]))
    lines = [(s, scores[scores["site"] == s], shades[4 * i // len(sites)], places[0]) for i, s in enumerate(sites)]
    for name, line, stroke, place in [*lines, ("loss", rows[rows["metric"] == "loss"], STRONG, places[1])]:
        line = line.sort_values("step")
        label = plain(short_site(name))
        figure.add_scatter(
            x=line["step"].tolist(), y=line["value"].tolist(), mode="lines+markers", name=label,
            line={"color": stroke}, marker={"size": 5}, error_y=interval_bars(line),
            hovertemplate="step %{x}: %{y:.3f}<extra>" + label + "</extra>", **place,
        )  # fmt: skip
    metric = ", ".join(dict.fromkeys(scores["metric"])).replace("r2", "R²")
    figure.update_xaxes(matches="x")
    figure.update_xaxes(showticklabels=False, row=1)
    figure.update_yaxes(title=f"{metric} of position", row=1)
    figure.update_yaxes(title="loss, nats a token", rangemode="tozero", row=2)
    title_lowest(figure, places, "training step")
    return finish(figure)


def _sites(names: list[str]) -> tuple[go.Figure, list[dict[str, int]]]:
    """A panel a site, sharing the vertical axis."""
    return panels([[plain(short_site(n)) for n in names]], height=210, most=4, gap=70, beside=0.025)


def _raised_titles(figure: go.Figure) -> go.Figure:
    """Above the labels that stand on the bars."""
    for title in figure.layout.annotations:
        if title.yref == "paper":
            title.yshift = 8
    return figure


def _banded(
    figure: go.Figure, line: pd.DataFrame, along: str, control: str, place: dict[str, int], *, legend: bool
) -> None:
    """A line with its interval as a band."""
    x, name = line[along].astype(int).tolist(), plain(CONTROL_LABELS.get(control, control))
    stroke = CONTROL_COLOURS.get(control) or colour(control)
    add_band(figure, x, line, stroke, control, **place)
    figure.add_scatter(
        x=x, y=line["value"].tolist(), mode="lines", name=name, legendgroup=control, showlegend=legend,
        line={"color": stroke, "dash": DASHES.get(control, "solid"), "width": 2},
        hovertemplate="%{x}: %{y:.4g}<extra>" + name + "</extra>", **place,
    )  # fmt: skip
