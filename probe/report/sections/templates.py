"""Attention beside its templates."""

import pandas as pd
import plotly.graph_objects as go

from probe.report import attention
from probe.report.page import Line, Section
from probe.report.sections.base import Figures, Part, Results, of_each
from probe.report.tables import beside_untrained, of

DISTANCE = "jensen_shannon"


def figures(results: Results) -> dict[str, go.Figure]:
    found: dict[str, go.Figure] = {}
    templates = results.of("templates", metric=DISTANCE)
    if len(templates):
        found["template_distances"] = attention.plot_template_distances(templates)
    for name, heads in results.drawings.get("maps", {}).items():
        found[f"attention_{name}"] = attention.plot_attention_maps(_closest_head_of_each_layer(heads))
    return found


def section(results: Results, drawn: Figures) -> Section:
    rows, figures, tables = results.rows, of_each(drawn, "attention_"), []
    if "template_distances" in drawn:
        figures.append(("Distance of every head from every template (a point a head).", drawn["template_distances"]))
        tables.append(
            ("Mean over all heads, in parentheses before training; fitted parameters of a head.", template_table(rows))
        )
        tables.append(("The nearest template of each head beside its nulls, means over heads.", null_table(rows)))
    trained = of(rows, "trained_t5")
    if len(trained):
        tables.append(
            (
                f"Distance from the bias that the model {trained['table'].iloc[0]} has learned: each head beside the "
                "column of the table with its own number, means over heads.",
                beside_untrained(trained, "template"),
            )
        )
    return Section(
        "Attention beside its templates",
        [
            "For each layer, the head that lies closest to its nearest template: its mean pattern over held-out "
            "sequences, the template, the difference. Fitted templates were fitted to one half of the sequences and "
            "every distance measured on the other, so that a family gains nothing there by having more parameters; the "
            "number is the Jensen–Shannon divergence in nats, from 0 to ln 2 = 0.693, a mean over sequences and query "
            "positions.",
            "Nulls: the distance of the same heads from uniform attention; of the same patterns with the keys of each "
            "row shuffled, from the template fitted to them anew; and of each head from the nearest head of another "
            "seed of its model, where there is one.",
        ],
        figures=figures,
        tables=tables,
    )


def lines(results: Results) -> list[Line]:
    """How much of attention position explains at all, which is what a nearness to a template has to be read beside."""
    if results.of("templates").empty or results.of("split").empty:
        return []
    explained = null_table(results.rows).set_index("model")["explained"]
    split = results.of("split", control="none", scope="seen", part="distance", metric="toeplitz_r2")
    toeplitz = split.groupby("model")["value"].mean()
    said = [f"{m} {explained[m]:.0%} and {toeplitz[m]:.0%}" for m in explained.index if m in toeplitz]
    text = (
        "How much of attention position explains: of the divergence from uniform, by each head's best template, and of "
        "the scores' variance within rows, by f_rel; means over heads. The rest is content."
    )
    return [Line("Attention", text, said)]


def template_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean distance over heads, a row a template, one column per model; the untrained model's in parentheses."""
    templates = of(rows, "templates", metric=DISTANCE)
    parameters = templates.groupby("template")["n_parameters"].max().astype(int)
    table = beside_untrained(templates, "template")
    table.insert(1, "fitted parameters", table["template"].map(parameters))
    return table


def null_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The nearest template of each head and the nulls, means over heads, one row per model."""
    templates = of(rows, "templates", metric=DISTANCE, control="none")
    nearest = templates.loc[templates.groupby(["model", "layer", "head"], sort=False)["value"].idxmin()]
    columns = {
        "value": "nearest template",
        "null_uniform": "from uniform",
        "null_shuffled": "keys shuffled",
        "null_seed": "another seed",
        "explained": "explained",
    }
    columns = {column: name for column, name in columns.items() if column in nearest}
    means = nearest.groupby("model", sort=False)[list(columns)].mean()
    means["most often"] = nearest.groupby("model")["template"].agg(lambda names: names.mode().iloc[0])
    return means.rename(columns=columns).reset_index()


def _closest_head_of_each_layer(heads: pd.DataFrame) -> pd.DataFrame:
    one = heads.drop_duplicates(["layer", "head"]).sort_values("template_distance").drop_duplicates("layer")
    return heads.merge(one[["layer", "head"]], on=["layer", "head"])


PART = Part(("templates", "trained_t5", "maps"), figures, section, lines)
