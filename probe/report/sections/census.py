"""The census of heads: what each looks like, and what it is used for."""

import pandas as pd
import plotly.graph_objects as go

from probe.report import attention
from probe.report.page import Section
from probe.report.sections.base import Figures, Part, Results
from probe.report.tables import beside_untrained


def figures(results: Results) -> dict[str, go.Figure]:
    found: dict[str, go.Figure] = {}
    census = results.of("census", control="none")
    if len(census):
        found["census"] = attention.plot_census_grid(census)
        if census["metric"].isin(list(attention.LOSSES)).any():
            found["census_losses"] = attention.plot_census_losses(census)
    return found


def section(results: Results, drawn: Figures) -> Section:
    census = results.of("census")
    figures = []
    if "census" in drawn:
        figures.append(("What each head looks like; hover for its scores.", drawn["census"]))
    if "census_losses" in drawn:
        figures.append(("What the model loses when a head's pattern is replaced.", drawn["census_losses"]))
    return Section(
        "Census of heads",
        [
            "The label says what a head's pattern looks like, the losses what it is used for: the change of the "
            "next-token loss (nats a token, over the tokens that the model learns to predict, held-out sequences) when "
            "its pattern is replaced by its best template, by itself with uniform attention in the template's place, "
            "or by uniform attention. Shade: the share of the pattern's variance that the best template explains. 95 % "
            "bootstrap over sequences, paired; one head at a time."
        ],
        figures=figures,
        tables=[("Heads by label, in parentheses before training, and what they are used for.", census_counts(census))]
        if len(census)
        else [],
    )


def census_counts(census: pd.DataFrame) -> pd.DataFrame:
    """How many heads have each label, and how many are used for what, one column per model."""
    heads = census.drop_duplicates(["model", "control", "layer", "head"])
    labels = heads.groupby(["model", "control", "label"], sort=False).size().rename("value").reset_index()
    table = beside_untrained(labels, "label", "{:.0f}")
    used = heads[heads["control"] == "none"].groupby(["model", "used_for"]).size().unstack(0).fillna(0).astype(int)
    used = used.rename_axis(columns=None).reset_index().rename(columns={"used_for": "label"})
    both = pd.concat([table, used.assign(label="used for " + used["label"])], ignore_index=True)
    return both.rename_axis(columns="model")


PART = Part(("census",), figures, section)
