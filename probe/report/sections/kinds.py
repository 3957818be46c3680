"""Hybrids: what the layers that see position do, and what the others."""

import plotly.graph_objects as go

from probe.report.hybrids import plot_attention_by_kind
from probe.report.page import Line, Section
from probe.report.sections.base import Figures, Part, Results, shown
from probe.report.tables import interval_of


def figures(results: Results) -> dict[str, go.Figure]:
    found, needle = results.of("by_layer_encoding"), results.of("needle")
    if found.empty or needle.empty:
        return {}
    needle = needle[needle["model"].isin(found["model"])]
    return {"reach_by_kind": plot_attention_by_kind(needle, "reach")} if len(needle) else {}


def section(results: Results, drawn: Figures) -> Section:
    found, tables = results.of("by_layer_encoding"), []
    if len(found):
        found = found.assign(text=found.apply(interval_of, axis=1))
        table = found.pivot_table(
            index=["model", "of", "metric"], columns="layer_encoding", values="text", aggfunc="first", sort=False
        )
        tables.append(("Means over heads by what their layer sees.", table.rename_axis(columns=None).reset_index()))
        fit = results.of("fit", scope="all", control="none", metric="r2", target="position")
        if len(fit):
            fit = fit[fit["site"].str.endswith("hook_resid_post") & fit["model"].isin(found["model"])]
            probes = fit.groupby(["model", "layer_encoding"], sort=False)["value"].mean().rename("mean R²")
            tables.append(("R² of the position after the layers of each kind, mean over layers.", probes.reset_index()))
    return Section(
        "Layers that see position, and layers that do not",
        [
            "Yang et al. 2025 (Rope to Nope and Back Again) report that layers without positions retrieve, and rotary "
            "layers stay local. Means over the heads of each kind of layer, and their difference; brackets are 95 % "
            "bootstrap intervals over heads, which say nothing of other seeds. Of the key: as above. Of the census: "
            "its scores."
        ],
        figures=shown(drawn, {"reach_by_kind": "Reach of every head, from the question for the key."}),
        tables=tables,
    )


def lines(results: Results) -> list[Line]:
    rows, found = results.of("by_layer_encoding", metric="on_keys"), []
    rows = rows[rows["layer_encoding"].str.contains(" - ", regex=False)] if len(rows) else rows
    for row in rows.to_dict("records"):
        text = (
            f"{row['model']}: heads of layers without position put {interval_of(row)} more of their attention on a "
            f"key that is asked for than those of the others ({row['layer_encoding']}; interval over heads)."
        )
        found.append(Line("Hybrid", text))
    return found


PART = Part(("by_layer_encoding",), figures, section, lines)
