"""Figures of position in hidden states: where it can be read, how far, and whether the model misses it."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probe.report.figures import CONTROL_LABELS, DASHES, LAYOUT, colour, interval_bars, plain, short_site, some

CONCEPTS = {"position": "circle", "classes": "square"}


def erasure_losses(rows: pd.DataFrame, metric: str = "loss") -> go.Figure:
    """The change of the loss (or of another metric) when position is erased at a site, a panel an encoding, beside
    random subspaces of the same rank in grey, with intervals.

    Rows: those of ``erase_position`` with encoding.
    """
    rows = some(rows[(rows["metric"] == metric) & rows["length"].isna()], f"erased positions, metric {metric!r}")
    encodings = list(dict.fromkeys(rows["encoding"]))
    figure = make_subplots(
        cols=len(encodings), shared_yaxes=True, subplot_titles=[plain(e) for e in encodings], horizontal_spacing=0.015
    )
    for column, encoding in enumerate(encodings, start=1):
        of = rows[rows["encoding"] == encoding]
        for (concept, control), line in of.groupby(["concept", "control"], sort=False):
            erased = control == "none"
            what = f"{concept} erased" if erased else f"random, rank of {concept}"
            figure.add_scatter(
                x=[short_site(s) for s in line["site"]],
                y=line["value"].tolist(),
                name=what,
                legendgroup=what,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": colour(encoding) if erased else "#999999", "dash": "solid" if erased else "dot"},
                marker={"symbol": CONCEPTS.get(concept, "diamond"), "size": 8},
                error_y=interval_bars(line, width=3),
                text=[f"rank {int(r)}" for r in line["rank"]],
                hovertemplate="%{x}: %{y:.3f} (%{text})<extra>" + plain(what) + "</extra>",
                row=1,
                col=column,
            )
    figure.update_xaxes(tickangle=-35)
    figure.update_yaxes(title=f"change of {plain(metric.replace('_', ' '))}", col=1)
    return figure.update_layout(**LAYOUT, height=430, legend={"orientation": "h", "y": -0.35})


def probe_heatmap(rows: pd.DataFrame, target: str = "position", against: str = "untrained") -> go.Figure:
    """The R² of ridge probes, layers × sites, a panel an encoding. The number is the R²; the colour its selectivity,
    the R² less that of the control ``against``: what is white could be read there without it, too.

    Rows: those of ``probe_positions`` with encoding.
    """
    rows = rows[(rows["target"] == target) & (rows["scope"] == "all") & rows["site"].str.startswith("blocks.")]
    rows = some(rows, f"probes of {target!r} by layer and site")
    rows = rows.assign(
        layer=rows["site"].str.split(".").str[1].astype(int),
        place=rows["site"].map(lambda site: short_site(site).split(".", 1)[1]),
    )
    encodings = list(dict.fromkeys(rows["encoding"]))
    places = list(dict.fromkeys(rows["place"]))
    figure = make_subplots(
        rows=len(encodings),
        shared_xaxes=True,
        subplot_titles=[plain(e) for e in encodings],
        vertical_spacing=min(0.06, 0.3 / len(encodings)),
    )
    for row, encoding in enumerate(encodings, start=1):
        of = rows[rows["encoding"] == encoding]

        def grid(values: pd.DataFrame) -> pd.DataFrame:
            return values.pivot(index="layer", columns="place", values="value").reindex(columns=places)

        r2 = grid(of[(of["control"] == "none") & (of["metric"] == "r2")])
        gained = grid(of[(of["control"] == against) & (of["metric"] == "selectivity")])
        figure.add_heatmap(
            z=gained.to_numpy(),
            x=[plain(p) for p in places],
            y=r2.index.tolist(),
            text=r2.to_numpy(),
            texttemplate="%{text:.2f}",
            hovertemplate="layer %{y}, %{x}: R² %{text:.4f}, less the control %{z:+.4f}<extra></extra>",
            coloraxis="coloraxis",
            xgap=2,
            ygap=2,
            row=row,
            col=1,
        )
        figure.update_yaxes(title="layer", dtick=1, autorange="reversed", row=row, col=1)
    figure.update_xaxes(tickangle=-35)
    title = {"title": f"R² less<br>{plain(CONTROL_LABELS.get(against, against))}", "len": 0.6}
    scale = {"colorscale": "RdBu", "cmid": 0, "reversescale": True, "colorbar": title}
    n_layers = rows["layer"].nunique()
    return figure.update_layout(**LAYOUT, height=150 + (55 + 32 * n_layers) * len(encodings), coloraxis=scale)


def extrapolation_curve(rows: pd.DataFrame, metric: str = "mean_absolute_error") -> go.Figure:
    """The error of a probe by position, fitted up to a length and scored beyond it, a panel an encoding, at the last
    site that there is, beside its controls; the diagonal is that of a probe that says the last fitted position.

    Rows: those of ``probe_positions`` with ``fitted_length`` and encoding.
    """
    bins = rows[(rows["scope"] == "bin") & (rows["metric"] == metric)]
    bins = some(bins[bins["site"] == bins["site"].iloc[-1]] if len(bins) else bins, "probe errors by position")
    fitted = int(rows[rows["scope"] == "fitted"]["position_end"].iloc[0])
    encodings = list(dict.fromkeys(bins["encoding"]))
    figure = make_subplots(
        cols=len(encodings), shared_yaxes=True, subplot_titles=[plain(e) for e in encodings], horizontal_spacing=0.015
    )
    for column, encoding in enumerate(encodings, start=1):
        at = {"row": 1, "col": column}
        for control, line in bins[bins["encoding"] == encoding].groupby("control", sort=False):
            label = CONTROL_LABELS.get(control, control)
            figure.add_scatter(
                x=((line["position"] + line["position_end"] - 1) / 2).tolist(),
                y=line["value"].tolist(),
                name=label,
                legendgroup=label,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": colour(encoding) if control == "none" else "#999999", "dash": DASHES.get(control)},
                marker={"size": 5},
                error_y=interval_bars(line),
                hovertemplate="position %{x}: %{y:.2f}<extra>" + plain(label) + "</extra>",
                **at,
            )
        if metric == "mean_absolute_error":
            last = float(bins["position_end"].max() - 1)
            figure.add_scatter(
                x=[fitted - 1, last], y=[0, last - fitted + 1], mode="lines", name="says the last fitted position",
                legendgroup="stuck", showlegend=column == 1, line={"color": "#D55E00", "width": 1, "dash": "dot"}, **at,
            )  # fmt: skip
        figure.add_vline(x=fitted - 0.5, line_width=1, line_dash="dot", line_color="#666666", **at)
    figure.update_xaxes(title="position")
    figure.update_yaxes(title=f"{plain(metric.replace('_', ' '))}, tokens", col=1)
    return figure.update_layout(**LAYOUT, height=400, legend={"orientation": "h", "y": -0.25})


def loss_along_texts(rows: pd.DataFrame) -> go.Figure:
    """The loss of a token by its position in a text, a line a model, intervals as bands.

    Rows: ``loss_by_position`` with encoding.
    """
    rows = some(rows, "loss by position")
    figure = go.Figure()
    for name, line in rows.groupby("encoding", sort=False):
        x = line["position"].tolist()
        figure.add_scatter(
            x=x + x[::-1], y=[*line["high"], *line["low"][::-1]], fill="toself", mode="none", opacity=0.2,
            fillcolor=colour(name), hoverinfo="skip", showlegend=False, legendgroup=name,
        )  # fmt: skip
        figure.add_scatter(
            x=x, y=line["value"].tolist(), mode="lines", name=plain(name), legendgroup=name,
            line={"color": colour(name)}, hovertemplate="position %{x}: %{y:.3f}<extra>" + plain(name) + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(title="position, tokens")
    figure.update_yaxes(title="loss, nats a token")
    return figure.update_layout(**LAYOUT, height=360, showlegend=True)
