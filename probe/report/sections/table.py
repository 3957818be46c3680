"""A learned table of positions."""

import plotly.graph_objects as go

from probe.report.page import Line, Section
from probe.report.position_table import plot_table_curves, plot_table_map
from probe.report.sections.base import Figures, Part, Results
from probe.report.tables import MISSING


def figures(results: Results) -> dict[str, go.Figure]:
    found: dict[str, go.Figure] = {}
    for name in _models(results):
        similarity, basis, numbers = (results.of(each, model=name) for each in ("table_map", "table_basis", "table"))
        if len(similarity) or len(basis):
            found[f"table_map_{name}"] = plot_table_map(similarity, basis)
        if len(numbers):
            found[f"table_curves_{name}"] = plot_table_curves(numbers)
    return found


def _models(results: Results) -> list[str]:
    """The models whose table of positions was measured."""
    rows = results.rows[results.rows["measurement"].isin(PART.measurements)]
    return list(dict.fromkeys(rows["model"][~rows["metric"].isin(MISSING)]))


def section(results: Results, drawn: Figures) -> Section:
    numbers, figures, tables = results.of("table"), [], []
    for name in _models(results):
        for prefix, words in (
            ("table_map_", "how alike positions are, and the first principal components"),
            ("table_curves_", "norms, and similarity by distance"),
        ):
            if prefix + name in drawn:
                figures.append((f"{name}: {words}.", drawn[prefix + name]))
    if len(numbers):
        single = numbers[numbers["position"].isna() & numbers["lag"].isna()]
        wide = single.pivot_table(index=["model", "metric"], columns="control", values="value", sort=False)
        wide = wide[["none", "untrained", "shuffled"]].rename(columns={"none": "learned", "untrained": "fresh"})
        tables = [("Numbers of the table.", wide.rename_axis(columns=None).reset_index())]
    return Section(
        "The table of positions",
        [
            "The vectors that the model adds to its embeddings, less their mean. participation_ratio: the number of "
            "dimensions that they fill, (Σ λ)² / Σ λ². low_frequencies_90: the share of the frequencies along "
            "positions, from the lowest on, that has 90 % of the variance; .9 for white noise. Controls: a fresh "
            "table, and the same vectors dealt out anew among positions."
        ],
        figures=figures,
        tables=tables,
    )


def lines(results: Results) -> list[Line]:
    found, table = [], results.of("table", metric="components_95")
    for name, part in table.groupby("model", sort=False) if len(table) else ():
        value, fresh = (part[part["control"] == c]["value"].item() for c in ("none", "untrained"))
        smooth = results.of("table", metric="low_frequencies_90", model=name).set_index("control")["value"]
        text = (
            f"{name}'s table of positions has 95 % of its variance in {value:.0f} dimensions (a fresh one in "
            f"{fresh:.0f}), and 90 % in the lowest {smooth['none']:.1%} of the frequencies along positions (dealt out "
            f"anew: {smooth['shuffled']:.0%})."
        )
        found.append(Line("Table", text))
    return found


PART = Part(("table", "table_basis", "table_map"), figures, section, lines)
