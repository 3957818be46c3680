"""Figures and page of the league of encodings: ranks, differences, accuracy by length; published ones beside ours."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probe.report.figures import LAYOUT, colour, interval, interval_bars, plain, some
from probe.report.page import Section, render_page

MARKS = ("circle", "diamond-open", "square-open", "cross-open")
METRICS = {"mean_reciprocal_rank": "mean reciprocal rank", "mean_accuracy": "mean accuracy"}


def league_ranks(leagues: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Mean reciprocal rank, and mean accuracy beside it, of every encoding with intervals, a mark a source of results.

    Rows, by source: those of ``probe.training.league.league``.
    """
    rows = some(pd.concat([r.assign(source=s) for s, r in leagues.items()], ignore_index=True), "ranks")
    first = rows[(rows["metric"] == "mean_reciprocal_rank")].drop_duplicates("encoding")
    encodings = first.sort_values("value", ascending=True, kind="stable")["encoding"].tolist()
    figure = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=list(METRICS.values()))
    height = {e: i for i, e in enumerate(encodings)}
    for i, source in enumerate(leagues):
        for column, metric in enumerate(METRICS, start=1):
            line = rows[(rows["source"] == source) & (rows["metric"] == metric)]
            figure.add_scatter(
                x=line["value"].tolist(),
                y=[height[e] + 0.16 * (i - (len(leagues) - 1) / 2) for e in line["encoding"]],
                mode="markers",
                name=plain(source),
                legendgroup=source,
                showlegend=column == 1,
                row=1,
                col=column,
                marker={
                    "symbol": MARKS[i % len(MARKS)],
                    "size": 11,
                    "color": [colour(e) for e in line["encoding"]],
                    "line": {"width": 2, "color": [colour(e) for e in line["encoding"]]},
                },
                error_x=interval_bars(line) | {"color": "#888888"},
                customdata=[
                    f"{plain(r.encoding)}: {interval(r.value, r.low, r.high)}, {r.n} runs of {r.n_tasks} tasks"
                    for r in line.itertuples()
                ],
                hovertemplate="%{customdata}<extra>" + plain(source) + "</extra>",
            )
    figure.update_yaxes(tickvals=list(height.values()), ticktext=[plain(e) for e in encodings])
    figure.update_xaxes(range=[-0.03, 1.03])
    return figure.update_layout(**LAYOUT, height=150 + 48 * len(encodings), legend={"orientation": "h", "y": -0.2})


def league_differences(rows: pd.DataFrame) -> go.Figure:
    """Accuracy of the encoding of a row less that of a column; a star where the difference is real.

    Rows: those of ``probe.training.league.paired_differences``.
    """
    rows = some(rows, "differences between encodings")
    mean = pd.concat([rows.groupby("a")["value"].sum(), -rows.groupby("b")["value"].sum()])
    names = mean.groupby(level=0).sum().sort_values(ascending=False, kind="stable").index.tolist()
    at = {name: i for i, name in enumerate(names)}
    values = np.full((len(names), len(names)), np.nan)
    text = np.full(values.shape, "", dtype=object)
    for r in rows.itertuples():
        star = "*" if r.real else ""
        for a, b, sign in ((r.a, r.b, 1), (r.b, r.a, -1)):
            values[at[a], at[b]], text[at[a], at[b]] = sign * r.value, f"{sign * r.value:+.2f}{star}"
    most = float(np.nanmax(np.abs(values))) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values, x=[plain(n) for n in names], y=[plain(n) for n in names], text=text, texttemplate="%{text}",
            colorscale="RdBu", reversescale=True, zmin=-most, zmax=most, colorbar={"title": "difference"},
            hovertemplate="%{y} less %{x}: %{text}<extra></extra>", hoverongaps=False,
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    layout = LAYOUT | {"margin": LAYOUT["margin"] | {"l": 110}}
    return figure.update_layout(**layout, width=260 + 75 * len(names), height=150 + 45 * len(names))


def league_by_length(rows: pd.DataFrame, width: int = 4) -> go.Figure:
    """Accuracy against length, a panel a task, a line an encoding, the interval over seeds as a band.

    Rows: those of ``probe.training.league.accuracy_by_length``.
    """
    rows = some(rows, "accuracy by length")
    tasks = list(dict.fromkeys(rows["task"]))
    n_rows = -(-len(tasks) // width)
    figure = make_subplots(
        rows=n_rows, cols=min(width, len(tasks)), shared_yaxes="all", horizontal_spacing=0.03,
        vertical_spacing=0.28 / n_rows, subplot_titles=[plain(t) for t in tasks],
    )  # fmt: skip
    shown: set[str] = set()
    for panel, task in enumerate(tasks):
        at = {"row": panel // width + 1, "col": panel % width + 1}
        for encoding, line in rows[rows["task"] == task].groupby("encoding", sort=True):
            line = line.sort_values("length")
            x, stroke = line["length"].astype(int).tolist(), colour(encoding)
            if line["low"].notna().all():
                figure.add_scatter(
                    x=x + x[::-1], y=[*line["high"], *line["low"][::-1]], fill="toself", mode="none", opacity=0.12,
                    fillcolor=stroke, hoverinfo="skip", showlegend=False, legendgroup=encoding, **at,
                )  # fmt: skip
            figure.add_scatter(
                x=x, y=line["value"].tolist(), mode="lines", line={"color": stroke}, name=plain(encoding),
                legendgroup=encoding, showlegend=encoding not in shown, customdata=line["n"].tolist(),
                hovertemplate="length %{x}: %{y:.3f} (%{customdata} seeds)<extra>" + plain(encoding) + "</extra>", **at,
            )  # fmt: skip
            shown.add(encoding)
    figure.update_yaxes(range=[-0.03, 1.05])
    figure.update_yaxes(title="exact match", col=1)
    figure.update_xaxes(title="length", row=n_rows)
    figure.update_annotations(font_size=12)
    height = 130 + 220 * n_rows
    return figure.update_layout(**LAYOUT, height=height, legend={"orientation": "h", "y": -75 / (height - 105)})


def league_page(
    leagues: Mapping[str, pd.DataFrame],
    differences: Mapping[str, pd.DataFrame],
    by_length: Mapping[str, pd.DataFrame],
    said: Sequence[str] = (),
) -> str:
    """The league as one HTML file, by source of results; ``said`` stands below the summary."""
    summary = [
        f"{source}: {', '.join(f'{r.encoding} {interval(r.value, r.low, r.high)}' for r in _ranks(rows).itertuples())} "
        f"({rows['n'].iloc[0]} (task, seed) of {rows['n_tasks'].iloc[0]} tasks)."
        for source, rows in leagues.items()
    ]
    sections = [
        Section(
            "The league",
            [
                "Mean reciprocal rank of each encoding over (task, seed), by accuracy on lengths beyond the trained "
                "ones; encodings that tie share the reciprocal ranks of their places, so a column sums to Σ 1/k. "
                "Bars: 95 % bootstrap over tasks, and over seeds within each."
            ],
            figures=[("Ranks, and the accuracies behind them.", league_ranks(leagues))],
            tables=[(f"{source}.", _league_table(rows)) for source, rows in leagues.items()],
        )
    ]
    for source, rows in differences.items():
        text = [
            "Accuracy of the row's encoding less that of the column's, paired over tasks and seeds; a star where signs "
            "flipped at random over (task, seed) give as much in fewer than 5 % of cases, corrected for all pairs "
            "(Holm). p over tasks asks whether other tasks would show it; few tasks cannot say."
        ]
        table = rows.assign(real=rows["real"].map({True: "yes", False: "no"}))
        figures = [("Differences of accuracy.", league_differences(rows))]
        sections.append(Section(f"Which differences are real? {source}", text, figures, [("Every pair.", table)]))
    for source, rows in by_length.items():
        text = ["Mean over seeds; bands are Student's t intervals over seeds, wide where these are few."]
        figures = [("Exact match by length.", league_by_length(rows))]
        sections.append(Section(f"Accuracy by length. {source}", text, figures))
    return render_page("Which encoding generalises to longer inputs?", [*summary, *said], sections)


def _ranks(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["metric"] == "mean_reciprocal_rank"]


def _league_table(rows: pd.DataFrame) -> pd.DataFrame:
    told = rows.assign(told=[interval(r.value, r.low, r.high) for r in rows.itertuples()])
    table = told.pivot(index="encoding", columns="metric", values="told").reindex(_ranks(rows)["encoding"])
    return table[list(METRICS)].rename(columns=METRICS).reset_index()
