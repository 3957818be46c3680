"""Exact match by length."""

import pandas as pd
import plotly.graph_objects as go

from probe.report.accuracy import plot_accuracy_by_length
from probe.report.page import Line, Section
from probe.report.sections.base import Figures, Part, Results, shown
from probe.report.tables import interval_of, of

IN_DISTRIBUTION, LONGER = "validation", "test"


def figures(results: Results) -> dict[str, go.Figure]:
    # Where a length stands in both splits, as it may in tasks whose examples are drawn, the test's is shown.
    rows = results.of("accuracy")
    if rows.empty:
        return {}
    return {
        "accuracy": plot_accuracy_by_length(
            rows.sort_values("split").drop_duplicates(["model", "length"]), results.train_length
        )
    }


def section(results: Results, drawn: Figures) -> Section:
    table = accuracy_table(results.rows)
    return Section(
        "Accuracy by length",
        [
            "Exact match: the share of held-out sequences whose greedy completion equals the target, token by token "
            "and in length. Bands and brackets are 95 % Wilson intervals over sequences; one training seed, so they "
            "say nothing about other seeds."
        ],
        figures=shown(drawn, {"accuracy": "Exact match by length."}),
        tables=[("In distribution (held-out sequences of trained lengths) and beyond.", table)] if len(table) else [],
    )


def lines(results: Results) -> list[Line]:
    accuracy = results.of("accuracy")
    if accuracy.empty:
        return []
    overall = accuracy[accuracy["length"].isna()].set_index(["model", "split"])
    found = []
    for split, lead, what in (
        (IN_DISTRIBUTION, "In distribution", "held-out sequences of trained lengths"),
        (LONGER, "Test set", "the test set, whose lengths go beyond"),
    ):
        models = dict.fromkeys(accuracy["model"])
        said = [f"{m} {interval_of(overall.loc[(m, split)])}" for m in models if (m, split) in overall.index]
        if said:
            found.append(Line(lead, f"Exact match on {what} (95 % Wilson over sequences; one training seed):", said))
    return found


def accuracy_table(rows: pd.DataFrame) -> pd.DataFrame:
    accuracy = of(rows, "accuracy")
    overall = accuracy[accuracy["length"].isna()]
    names = {IN_DISTRIBUTION: "in distribution", LONGER: "test"}
    return pd.DataFrame(
        {
            "model": overall["model"],
            "sequences": overall["split"].map(names),
            "exact match": overall["value"],
            "low": overall["low"],
            "high": overall["high"],
            "n": overall["n"].astype(int),
        }
    )


PART = Part(("accuracy",), figures, section, lines)
