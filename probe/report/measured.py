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
    return named({name: figure for part in parts_of(results, parts) for name, figure in part.figures(results).items()})


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
        results: what was measured.
        made: how the page was made.
        lead: lines of the summary that stand before those of the results.
        first: sections that stand before those of the results.
        parts: the parts that a page has, by name.
        drawn: the figures of ``figures_of_results``, where they are drawn already.
        all_rows: the rows that can be downloaded from the page; by default those of the results.
    """
    drawn = figures_of_results(results, parts) if drawn is None else drawn
    there = parts_of(results, parts)
    sections = [part.section(results, drawn) for part in there]
    sections = [*first, *(section for section in sections if section.figures or section.tables)]
    lines = [*lead, *(line for part in there for line in part.lines(results))]
    return render_page(title, lines, sections, rows=results.rows if all_rows is None else all_rows, made=made)
