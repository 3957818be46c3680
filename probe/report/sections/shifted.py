"""What a model loses when all positions are shifted."""

import plotly.graph_objects as go

from probe.report.accuracy import plot_under_shift
from probe.report.page import Line, Section
from probe.report.sections.base import Figures, Part, Results, shown
from probe.report.tables import interval_of


def figures(results: Results) -> dict[str, go.Figure]:
    rows = results.of("shifted")  # of models of transformers there are none
    if rows.empty:
        return {}
    beside = "exact_match" if (rows["metric"] == "exact_match").any() else "token_accuracy"
    return {"shifted": plot_under_shift(rows, beside)}


def section(results: Results, drawn: Figures) -> Section:
    moved = results.of("shifted", metric="loss_change")
    tables = []
    if len(moved):
        text = moved.assign(text=moved.apply(interval_of, axis=1), shift=moved["shift"].astype(int))
        table = text.pivot(index="shift", columns="model", values="text").reset_index()
        tables.append(("Change of the loss, nats a token, paired.", table))
    return Section(
        "Positions shifted",
        [
            "The same sequences, every position p taken for p + k (Sinha et al. 2022). A model that knows distances "
            "alone, or no position but by its own means, does not notice; what has learned absolute positions may. "
            "Loss, and the share of tokens or of whole answers that are right, given the right tokens before; 95 % "
            "bootstrap."
        ],
        figures=shown(drawn, {"shifted": "Loss and accuracy against the shift."}),
        tables=tables,
    )


def lines(results: Results) -> list[Line]:
    said = []
    for name, part in results.of("shifted", metric="loss_change").groupby("model", sort=False):
        most = part.loc[part["shift"].astype(int).idxmax()]
        said.append(f"{name} {interval_of(most)}, by {int(most['shift'])}")
    text = "What the loss gains, nats a token, when all positions are shifted:"
    return [Line("Shifted", text, said)] if said else []


PART = Part(("shifted",), figures, section, lines)
