"""By which mechanism a model knows position."""

import pandas as pd
import plotly.graph_objects as go

from probe.report.geometry import plot_mechanism_readouts
from probe.report.page import Section
from probe.report.sections.base import Figures, Part, Results, shown
from probe.report.tables import by_model, of


def figures(results: Results) -> dict[str, go.Figure]:
    rows = results.of("mechanism", model=results.portrayed, control="none")
    return {"mechanism": plot_mechanism_readouts(rows)} if len(rows) else {}


def section(results: Results, drawn: Figures) -> Section:
    table = "Verdicts, in parentheses of the untrained model."
    return Section(
        "By which mechanism?",
        [
            "Interventions on the tokens and on attention, each with a probe for position: a <bos> counter dies "
            "without <bos> and runs slow with a second one; decaying variance lives on in random content; an encoding "
            "survives a string of one token. A mechanism is available if position can be read by it, and used if "
            "disturbing it, with content held, moves the decoded position and costs more loss than changes that are as "
            "large in other directions; nothing means: not established on these sequences. (Position itself is there "
            "where the token embedding does not tell it already, as it does in tasks whose tokens have their places.)"
        ],
        figures=shown(drawn, {"mechanism": f"What is left of position. Model: {results.portrayed}."}),
        tables=[(table, verdict_table(results.rows))] if len(results.of("mechanism")) else [],
    )


def verdict_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The verdict on each mechanism, one column per model."""
    verdicts = of(rows, "mechanism").drop_duplicates(["mechanism", "model", "control"])
    told = verdicts.set_index(["mechanism", "model", "control"])["verdict"]
    encodings = list(dict.fromkeys(verdicts["model"]))
    found = [
        {"mechanism": name.replace("_", " ")}
        | {e: f"{told[name, e, 'none']} ({told[name, e, 'untrained']})" for e in encodings}
        for name in dict.fromkeys(verdicts["mechanism"])
    ]
    return by_model(found, ["mechanism", *encodings])


PART = Part(("mechanism",), figures, section)
