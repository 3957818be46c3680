"""Figures of position in hidden states: where it can be read, how far, and whether the model misses it."""

import pandas as pd
import plotly.graph_objects as go

from probe.report.drawing import add_band, counted, interval_bars, plain, short_site, some
from probe.report.style import (
    CONTROL_LABELS,
    DASHES,
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

CONCEPTS = {"position": "circle", "classes": "square"}
SCORES = {"r2": "R² of the position", "accuracy": "accuracy of the position"}


def plot_probe_by_site(rows: pd.DataFrame, metric: str) -> go.Figure:
    """A probe's score by site, one panel per model, the model beside its controls, bootstrap intervals.

    Rows: model, site, control, metric, value, low, high, and perhaps n_test, the sequences that it is scored on.
    """
    rows = some(rows[rows["metric"] == metric], f"probe scores {metric!r}")
    figure, places = _encodings(rows, 270)
    for place, (encoding, part) in zip(places, rows.groupby("model", sort=False), strict=True):
        for control, line in part.groupby("control", sort=False):
            own = control == "none"
            figure.add_scatter(
                x=[short_site(s) for s in line["site"]], y=line["value"].tolist(),
                name=plain(CONTROL_LABELS.get(control, control)), legendgroup=control, showlegend=place == places[0],
                mode="lines+markers", line={"color": colour(encoding) if own else GREY, "dash": DASHES.get(control)},
                marker={"symbol": look(encoding).symbol if own else "circle-open", "size": 7},
                error_y=interval_bars(line), **place,
            )  # fmt: skip
    figure.update_xaxes(tickangle=-35)
    figure.update_yaxes(title=SCORES.get(metric, plain(metric)) + counted(rows, column="n_test"), col=1)
    return finish(figure)


def plot_erasure_losses(rows: pd.DataFrame, metric: str = "loss") -> go.Figure:
    """The change of the loss (or of another metric) when position is erased at a site, one panel per model, beside
    random subspaces of the same rank in grey, with intervals.

    Rows: those of ``erase_position`` with model.
    """
    rows = some(rows[(rows["metric"] == metric) & rows["length"].isna()], f"erased positions, metric {metric!r}")
    figure, places = _encodings(rows, 270)
    for place, (encoding, part) in zip(places, rows.groupby("model", sort=False), strict=True):
        for (concept, control), line in part.groupby(["concept", "control"], sort=False):
            erased = control == "none"
            what = f"{concept} erased" if erased else f"random, rank of {concept}"
            figure.add_scatter(
                x=[short_site(s) for s in line["site"]], y=line["value"].tolist(), name=plain(what), legendgroup=what,
                showlegend=place == places[0], mode="lines+markers",
                line={"color": colour(encoding) if erased else GREY, "dash": "solid" if erased else "dot"},
                marker={"symbol": CONCEPTS.get(concept, "diamond"), "size": 8}, error_y=interval_bars(line, width=3),
                text=[f"rank {int(r)}" for r in line["rank"]],
                hovertemplate="%{x}: %{y:.3f} (%{text})<extra>" + plain(what) + "</extra>", **place,
            )  # fmt: skip
    unit = ", nats a token" if metric == "loss" else ""
    figure.update_xaxes(tickangle=-35)
    figure.update_yaxes(title=f"change of {plain(metric.replace('_', ' '))}{unit}{counted(rows)}", col=1)
    return finish(figure)


def plot_probe_heatmap(rows: pd.DataFrame, target: str = "position", against: str = "untrained") -> go.Figure:
    """The R² of ridge probes, layers × sites, one panel per model. The number is the R²; the colour its selectivity,
    the R² less that of the control ``against``: what is white could be read there without it, too.

    Rows: those of ``probe_positions`` with model.
    """
    rows = rows[(rows["target"] == target) & (rows["scope"] == "all") & rows["site"].str.startswith("blocks.")]
    rows = some(rows, f"probes of {target!r} by layer and site")
    rows = rows.assign(
        layer=rows["site"].str.split(".").str[1].astype(int),
        place=rows["site"].map(lambda site: short_site(site).split(".", 1)[1]),
    )
    encodings, sites = list(dict.fromkeys(rows["model"])), list(dict.fromkeys(rows["place"]))
    height = max(160 // len(encodings), 8 + 32 * rows["layer"].nunique())
    figure, places = panels([[plain(e)] for e in encodings], height=height, gap=34)
    for place, encoding in zip(places, encodings, strict=True):
        of = rows[rows["model"] == encoding]

        def grid(values: pd.DataFrame) -> pd.DataFrame:
            return values.pivot(index="layer", columns="place", values="value").reindex(columns=sites)

        r2 = grid(of[(of["control"] == "none") & (of["metric"] == "r2")])
        gained = grid(of[(of["control"] == against) & (of["metric"] == "selectivity")])
        figure.add_heatmap(
            z=gained.to_numpy(), x=[plain(site) for site in sites], y=r2.index.tolist(), text=r2.to_numpy(),
            texttemplate="%{text:.2f}", coloraxis="coloraxis", xgap=2, ygap=2,
            hovertemplate="layer %{y}, %{x}: R² %{text:.4f}, less the control %{z:+.4f}<extra></extra>", **place,
        )  # fmt: skip
        figure.update_yaxes(title="layer", dtick=1, autorange="reversed", **place)
    figure.update_xaxes(showticklabels=False)
    figure.update_xaxes(tickangle=-35, showticklabels=True, row=len(encodings))
    less = f"R² less<br>{plain(CONTROL_LABELS.get(against, against))}<br>{counted(rows, '', 'n_test').strip()}"
    bar = colour_bar(less, figure)
    return finish(figure, coloraxis=DIVERGING | {"cmid": 0, "colorbar": bar})


def plot_extrapolation_curve(rows: pd.DataFrame, metric: str = "mean_absolute_error") -> go.Figure:
    """The error of a probe by position, fitted up to a length and scored beyond it, one panel per model, at the last
    site that there is, beside its controls; the diagonal is that of a probe that says the last fitted position.

    Rows: those of ``probe_positions`` with ``fitted_length`` and model.
    """
    bins = rows[(rows["scope"] == "bin") & (rows["metric"] == metric)]
    bins = some(bins[bins["site"] == bins["site"].iloc[-1]] if len(bins) else bins, "probe errors by position")
    fitted = int(rows[rows["scope"] == "fitted"]["position_end"].iloc[0])
    figure, places = _encodings(bins, 270)
    for place, (encoding, part) in zip(places, bins.groupby("model", sort=False), strict=True):
        first = place == places[0]
        for control, line in part.groupby("control", sort=False):
            label, own = plain(CONTROL_LABELS.get(control, control)), control == "none"
            figure.add_scatter(
                x=((line["position"] + line["position_end"] - 1) / 2).tolist(), y=line["value"].tolist(), name=label,
                legendgroup=label, showlegend=first, mode="lines+markers",
                line={"color": colour(encoding) if own else GREY, "dash": DASHES.get(control)},
                marker={"size": 6, "symbol": look(encoding).symbol if own else "circle-open"},
                error_y=interval_bars(line), hovertemplate="position %{x}: %{y:.2f}<extra>" + label + "</extra>",
                **place,
            )  # fmt: skip
        if metric == "mean_absolute_error":
            last = float(bins["position_end"].max() - 1)
            figure.add_scatter(
                x=[fitted - 1, last], y=[0, last - fitted + 1], mode="lines", name="says the last fitted position",
                legendgroup="stuck", showlegend=first, line={"color": STRONG, "width": 1, "dash": "dot"}, **place,
            )  # fmt: skip
        figure.add_vline(x=fitted - 0.5, line_width=1, line_dash="dot", line_color=GREY, **place)
    title_lowest(figure, places, "position, tokens")
    figure.update_yaxes(title=f"{plain(metric.replace('_', ' '))}, tokens{counted(bins, column='n_test')}", col=1)
    return finish(figure)


def plot_loss_along_texts(rows: pd.DataFrame) -> go.Figure:
    """The loss of a token by its position in a text, a line a model, intervals as bands.

    Rows: ``loss_by_position`` with model.
    """
    rows = some(rows, "loss by position")
    figure = panel(290)
    for name, line in rows.groupby("model", sort=False):
        x = line["position"].tolist()
        add_band(figure, x, line, colour(name), name)
        figure.add_scatter(
            x=x, y=line["value"].tolist(), mode="lines", name=plain(name), legendgroup=name,
            line={"color": colour(name)}, hovertemplate="position %{x}: %{y:.3f}<extra>" + plain(name) + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(title="position, tokens")
    figure.update_yaxes(title=f"loss, nats a token{counted(rows, 'texts')}")
    return finish(figure, showlegend=True)


def _encodings(rows: pd.DataFrame, height: int) -> tuple[go.Figure, list[dict[str, int]]]:
    """A panel an encoding, in the order of the rows."""
    return panels([[plain(e) for e in dict.fromkeys(rows["model"])]], height=height, gap=115, beside=0.015)
