"""What a part of a page is made of, and what it makes: figures, a section and lines of the summary."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go

from probe.report.page import Line, Section
from probe.report.tables import MISSING, of


@dataclass(frozen=True)
class Results:
    """All that was measured of some models, as a page shows it."""

    rows: pd.DataFrame  #: the rows; "measurement" and "model" say of what
    #: by measurement and model, rows that are drawn and not among the others: attention maps and curves
    drawings: Mapping[str, Mapping[str, pd.DataFrame]] = field(default_factory=dict)
    train_length: int | None = None  #: the length with which the models were trained, where it is known

    def of(self, measurement: str, **where: Any) -> pd.DataFrame:
        """The rows of a measurement that have these values in these columns."""
        return of(self.rows, measurement, **where)

    @property
    def measurements(self) -> set[str]:
        """The names of the measurements that were made, drawn or asked for in vain."""
        return {*self.rows["measurement"], *self.drawings}

    @property
    def empty(self) -> bool:
        """Whether nothing was measured."""
        return not self.drawings and bool(self.rows["metric"].isin(MISSING).all())

    def of_first_training(self) -> "Results":
        """Without the rows of further trainings of a model. A page shows one number for each model."""
        if "replica" not in self.rows:
            return self
        return replace(self, rows=self.rows[self.rows["replica"].fillna(0) == 0])

    def trained_or_least(self, lengths: pd.Series) -> int:
        """The trained length; where it is not known, the least of the lengths that were measured."""
        return int(lengths.min()) if self.train_length is None else self.train_length

    @property
    def portrayed(self) -> str | None:
        """The model that is drawn where a figure shows one: NoPE where there is one, else the first."""
        names = list(dict.fromkeys(self.rows["model"].dropna())) if "model" in self.rows else []
        return "none" if "none" in names else next(iter(names), None)


Figures = Mapping[str, go.Figure]


def _no_lines(results: Results) -> list[Line]:
    return []


class Part(NamedTuple):
    """The part of a page that shows one measurement, or several that belong together.

    It is asked for figures, section and lines only where one of its measurements has rows or drawings (or where rows
    have one of these metrics, as of what failed).
    """

    measurements: tuple[str, ...]  #: of whose rows the part is
    figures: Callable[[Results], dict[str, go.Figure]]  #: figures by name
    section: Callable[[Results, Figures], Section]  #: the section, with some of the figures of the page
    lines: Callable[[Results], list[Line]] = _no_lines  #: lines of the summary


def parts_of(results: Results, parts: Mapping[str, Part]) -> list[Part]:
    """Those parts of which something was measured."""
    missing = results.rows["metric"].isin(MISSING)
    there = {*results.rows["measurement"][~missing], *results.rows["metric"][missing], *results.drawings}
    return [part for part in parts.values() if there.intersection(part.measurements)]


def table_part(measurement: str, title: str, text: Sequence[str] = ()) -> Part:
    """A part that shows the rows of one measurement as a table, without a figure.

    Args:
        measurement: whose rows are shown.
        title: of the section.
        text: paragraphs of the section.
    """

    def section(results: Results, drawn: Figures) -> Section:
        rows = results.of(measurement).dropna(axis=1, how="all").drop(columns=["measurement", "data"], errors="ignore")
        return Section(title, text, tables=[("All rows.", rows.reset_index(drop=True))])

    return Part((measurement,), lambda results: {}, section)


def shown(drawn: Figures, captions: Mapping[str, str]) -> list[tuple[str, go.Figure]]:
    """Captions and figures of those that were drawn."""
    return [(caption, drawn[name]) for name, caption in captions.items() if name in drawn]


def of_each(drawn: Figures, prefix: str) -> list[tuple[str, go.Figure]]:
    """The figures of every model whose names begin with a prefix."""
    return [(f"Model: {n.removeprefix(prefix)}.", figure) for n, figure in drawn.items() if n.startswith(prefix)]
