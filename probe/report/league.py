"""Figures and page of the league of encodings: ranks, differences, accuracy by length; published ones beside ours."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from probe.report.drawing import add_band, counted, interval, interval_bars, plain, signed_zero, some
from probe.report.page import Line, Made, Section, render_page
from probe.report.style import DIVERGING, GREY, colour, colour_bar, finish, look, panel, panels, title_lowest
from probe.report.tables import interval_of

MARKS = ("circle", "diamond-open", "square-open", "cross-open")
METRICS = {"mean_reciprocal_rank": "mean reciprocal rank", "mean_accuracy": "mean accuracy"}


def plot_league_ranks(leagues: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Mean reciprocal rank, and mean accuracy beside it, of every encoding with intervals, a mark a source of results.

    Rows, by source: those of ``probe.training.league``.
    """
    rows = some(pd.concat([r.assign(source=s) for s, r in leagues.items()], ignore_index=True), "ranks")
    first = rows[(rows["metric"] == "mean_reciprocal_rank")].drop_duplicates("encoding")
    encodings = first.sort_values("value", ascending=True, kind="stable")["encoding"].tolist()
    figure, places = panels([["", ""]], height=40 + 40 * len(encodings), beside=0.04)
    height = {e: i for i, e in enumerate(encodings)}
    for i, source in enumerate(leagues):
        for place, metric in zip(places, METRICS, strict=True):
            line = rows[(rows["source"] == source) & (rows["metric"] == metric)]
            figure.add_scatter(
                x=line["value"].tolist(),
                y=[height[e] + 0.16 * (i - (len(leagues) - 1) / 2) for e in line["encoding"]],
                mode="markers",
                name=plain(source),
                legendgroup=source,
                showlegend=place == places[0],
                **place,
                marker={
                    "symbol": MARKS[i % len(MARKS)],
                    "size": 11,
                    "color": [colour(e) for e in line["encoding"]],
                    "line": {"width": 2, "color": [colour(e) for e in line["encoding"]]},
                },
                error_x=interval_bars(line) | {"color": GREY},
                customdata=[
                    f"{plain(r.encoding)}: {interval(r.value, r.low, r.high)}, {r.n} runs of {r.n_tasks} tasks"
                    for r in line.itertuples()
                ],
                hovertemplate="%{customdata}<extra>" + plain(source) + "</extra>",
            )
    figure.update_yaxes(tickvals=list(height.values()), ticktext=[plain(e) for e in encodings])
    figure.update_xaxes(range=[-0.03, 1.03])
    for place, title in zip(places, METRICS.values(), strict=True):
        figure.update_xaxes(title=title + counted(rows, "runs"), **place)
    return finish(figure, showlegend=True)


def plot_league_differences(rows: pd.DataFrame) -> go.Figure:
    """Accuracy of the encoding of a row less that of a column; a star where the difference is real.

    Rows: those of ``probe.training.paired_differences``.
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
            values[at[a], at[b]], text[at[a], at[b]] = sign * r.value, signed_zero(sign * r.value, "+.2f") + star
    most = float(np.nanmax(np.abs(values))) or 1.0
    figure = panel(45 * len(names))
    figure.add_heatmap(
        z=values, x=[plain(n) for n in names], y=[plain(n) for n in names], text=text, texttemplate="%{text}",
        zmin=-most, zmax=most, colorbar=colour_bar("difference<br>of accuracy", figure), hoverongaps=False,
        hovertemplate="%{y} less %{x}: %{text}<extra></extra>", **DIVERGING,
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    return finish(figure)


def plot_league_by_length(rows: pd.DataFrame, width: int = 4) -> go.Figure:
    """Accuracy against length, a panel a task, a line an encoding, the interval over seeds as a band.

    Rows: those of ``probe.training.accuracy_by_length``.
    """
    rows = some(rows, "accuracy by length")
    tasks = list(dict.fromkeys(rows["task"]))
    figure, places = panels([[plain(t) for t in tasks]], height=170, most=width, gap=50)
    shown: set[str] = set()
    for place, task in zip(places, tasks, strict=True):
        for encoding, line in rows[rows["task"] == task].groupby("encoding", sort=True):
            line = line.sort_values("length")
            x, seen = line["length"].astype(int).tolist(), look(encoding)
            add_band(figure, x, line, seen.colour, encoding, **place)
            figure.add_scatter(
                x=x, y=line["value"].tolist(), mode="lines+markers", line={"color": seen.colour, "width": 1.5},
                marker={"symbol": seen.symbol, "size": 5}, name=plain(encoding), legendgroup=encoding,
                showlegend=encoding not in shown, customdata=line["n"].tolist(),
                hovertemplate="length %{x}: %{y:.3f} (%{customdata} seeds)<extra>" + plain(encoding) + "</extra>",
                **place,
            )  # fmt: skip
            shown.add(encoding)
    figure.update_yaxes(range=[-0.03, 1.05])
    figure.update_yaxes(title="exact match", col=1)
    title_lowest(figure, places, f"length, tokens{counted(rows, 'seeds')}")
    figure.update_annotations(font_size=12)
    return finish(figure)


def league_page(
    leagues: Mapping[str, pd.DataFrame],
    differences: Mapping[str, pd.DataFrame],
    by_length: Mapping[str, pd.DataFrame],
    said: Sequence[str] = (),
    *,
    rows: pd.DataFrame | None = None,
    made: Made | None = None,
) -> str:
    """The league as one HTML file, by source of results; ``said`` stands below the summary, and ``rows`` can be
    downloaded."""
    summary = [
        Line(
            source.capitalize(),
            f"Mean reciprocal rank (95 % Student's t over {found['interval'].iloc[0]}) of {found['n'].iloc[0]} "
            f"(task, seed) of {found['n_tasks'].iloc[0]} tasks:",
            [f"{r.encoding} {interval(r.value, r.low, r.high)}" for r in _ranks(found).itertuples()],
        )
        for source, found in leagues.items()
    ]
    sections = [
        Section(
            "The league",
            [
                "Mean reciprocal rank of each encoding over (task, seed), by accuracy on lengths beyond the trained "
                "ones; encodings that tie share the reciprocal ranks of their places, so a column sums to Σ 1/k. "
                "Bars: 95 % Student's t over the means of the tasks; of a single task, over its seeds."
            ],
            figures=[("Ranks, and the accuracies behind them.", plot_league_ranks(leagues))],
            tables=[(f"{source}.", _league_table(found)) for source, found in leagues.items()],
        )
    ]
    for source, found in differences.items():
        text = [
            "Accuracy of the row's encoding less that of the column's, paired over tasks and seeds; a star where the "
            "signs of whole tasks, flipped at random, give as much in fewer than 5 % of cases, corrected for all pairs "
            "(Holm). With fewer than six tasks there can be no star. p over runs flips (task, seed) pairs: it asks "
            "whether other seeds of these very tasks would show the difference."
        ]
        table = found.assign(real=found["real"].map({True: "yes", False: "no"}))
        figures = [("Differences of accuracy.", plot_league_differences(found))]
        sections.append(Section(f"Which differences are real? {source}", text, figures, [("Every pair.", table)]))
    for source, found in by_length.items():
        text = ["Mean over seeds; bands are Student's t intervals over seeds, wide where these are few."]
        figures = [("Exact match by length.", plot_league_by_length(found))]
        sections.append(Section(f"Accuracy by length. {source}", text, figures))
    title = "Which encoding generalises to longer inputs?"
    lines: list[str | Line] = [*summary, *said]
    return render_page(title, lines, sections, rows=rows, rows_file="results", made=made)


def _ranks(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["metric"] == "mean_reciprocal_rank"]


def _league_table(rows: pd.DataFrame) -> pd.DataFrame:
    told = rows.assign(told=[interval_of(row) for row in rows.to_dict("records")])
    table = told.pivot(index="encoding", columns="metric", values="told").reindex(_ranks(rows)["encoding"])
    return table[list(METRICS)].rename(columns=METRICS).rename_axis(columns=None).reset_index()
