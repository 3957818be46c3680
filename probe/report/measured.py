"""The page of whatever was measured: figures, sections and summary of the parts that have rows."""

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from probe.report.page import Line, Made, Section, render_page
from probe.report.sections import PARTS, Part, Results
from probe.report.sections.base import parts_of
from probe.report.style import named


def figures_of_results(results: Results, parts: Mapping[str, Part] = PARTS) -> dict[str, go.Figure]:
    """All figures by name; of what was not measured there is none."""
    shown = results.of_first_training()
    return named({name: figure for part in parts_of(shown, parts) for name, figure in part.figures(shown).items()})


def measured_page(
    title: str,
    results: Results,
    made: Made,
    *,
    lead: Sequence[Line] = (),
    first: Sequence[Section] = (),
    parts: Mapping[str, Part] = PARTS,
    drawn: dict[str, go.Figure] | None = None,
    all_rows: pd.DataFrame | None = None,
) -> str:
    """The report as one HTML file.

    Args:
        title: of the page.
        results: what was measured; of several trainings of a model the page shows the first.
        made: how the page was made.
        lead: lines of the summary that stand before those of the results.
        first: sections that stand before those of the results.
        parts: the parts that a page has, by name.
        drawn: the figures of ``figures_of_results``, where they are drawn already.
        all_rows: the rows that can be downloaded from the page; by default those of the results.
    """
    drawn = figures_of_results(results, parts) if drawn is None else drawn
    shown = results.of_first_training()
    there = parts_of(shown, parts)
    sections = [part.section(shown, drawn) for part in there]
    sections = [*first, *(section for section in sections if section.figures or section.tables)]
    lines = [*lead, *(line for part in there for line in part.lines(shown))]
    return render_page(
        title, lines, sections or [_counted(results)], rows=results.rows if all_rows is None else all_rows, made=made
    )


def _counted(results: Results) -> Section:
    """How many rows of each measurement there are, for a page on which nothing else is shown."""
    counts = results.rows["measurement"].value_counts(sort=False)
    table = pd.DataFrame({"measurement": counts.index, "rows": counts.to_numpy()})
    return Section("Measured", ["No figure shows these rows; they are in rows.parquet."], tables=[("Rows.", table)])
