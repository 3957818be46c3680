"""Probes of position: at every site, beyond the fitted length, over the training."""

import pandas as pd
import plotly.graph_objects as go

from probe.report.geometry import plot_position_against_loss
from probe.report.page import Line, Section
from probe.report.position import plot_extrapolation_curve, plot_probe_by_site, plot_probe_heatmap
from probe.report.sections.base import Figures, Part, Results, shown
from probe.report.tables import beside, by_model, interval_of, of

STREAM = "hook_resid_post"


def figures(results: Results) -> dict[str, go.Figure]:
    found = {}
    ridge, logistic = results.of("probe", probe="ridge"), results.of("probe", probe="logistic")
    if len(ridge):
        found["probe_r2"] = plot_probe_by_site(ridge, "r2")
    if len(logistic):
        found["probe_accuracy"] = plot_probe_by_site(logistic, "accuracy")
    fit = results.of("fit")
    in_layers = fit[fit["site"].str.startswith("blocks.")] if len(fit) else fit
    for target in dict.fromkeys(in_layers["target"]) if len(in_layers) else ():
        name = "probe_heatmap" if target == "position" else f"probe_heatmap_{target}"
        found[name] = plot_probe_heatmap(in_layers, target)
    beyond = results.of("extrapolation")
    if len(beyond):
        found["extrapolation"] = plot_extrapolation_curve(beyond)
    for name, run in results.of("over_training").groupby("model", sort=False):
        found[f"over_training_{name}"] = plot_position_against_loss(run)
    return found


def section(results: Results, drawn: Figures) -> Section:
    captions = {
        "probe_r2": "R² of the regressed position by site.",
        "probe_accuracy": "Accuracy of the classified position by site.",
        "probe_heatmap": "R² of the regressed position at every site and head; the colour is what training added.",
        **{
            name: f"R² of the target {name.removeprefix('probe_heatmap_')} at every site and head."
            for name in drawn
            if name.startswith("probe_heatmap_")
        },
        "extrapolation": "Error of a probe after the last layer, fitted left of the line only.",
    }
    prefix = "over_training_"
    captions |= {
        name: f"R² of the position and loss over the training of {name.removeprefix(prefix)}."
        for name in drawn
        if name.startswith(prefix)
    }
    return Section(
        "Position in hidden states",
        [
            "Linear probes on held-out sequences, split by sequence: ridge regression of the position (R²), and where "
            "it was asked for logistic classification of it (accuracy), beside controls: the same probe on an "
            "untrained model of the same shape, on the token embedding alone, and with the positions of each sequence "
            "shuffled. Only what stands above the untrained model was learned. Bars: 95 % bootstrap over test "
            "sequences."
        ],
        figures=shown(drawn, captions),
        tables=fit_tables(results.rows),
    )


def lines(results: Results) -> list[Line]:
    """How well position is read after the last layer of each model, in words."""
    ridge = results.of("probe", probe="ridge", metric="r2")
    if ridge.empty:
        return _of_fit(results)
    layer = ridge["site"].map(depth)
    last = ridge[layer == layer.groupby(ridge["model"]).transform("max")].set_index(["model", "control"])
    said = [
        f"{m} {interval_of(last.loc[(m, 'none')])} ({last.loc[(m, 'untrained'), 'value']:.3f}, "
        f"{last.loc[(m, 'embedding'), 'value']:.3f})"
        for m in dict.fromkeys(ridge["model"])
    ]
    text = (
        "Position is read from hidden states after the last layer with this R² (95 % bootstrap over sequences; in "
        "parentheses untrained, and from the token embedding alone):"
    )
    return [Line("Position", text, said)]


def _of_fit(results: Results) -> list[Line]:
    r2 = results.of("fit", scope="all", target="position", control="none", metric="r2")
    r2 = r2[r2["site"].str.endswith(STREAM)] if len(r2) else r2
    if r2.empty:
        return []
    last = r2[r2["site"].map(depth) == r2["site"].map(depth).max()]
    text = "Position is read after the last layer with this R² (95 % bootstrap over sequences and trainings):"
    return [Line("Position", text, [f"{r['model']} {interval_of(r)}" for r in last.to_dict("records")])]


def fit_tables(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """``fit_table`` with its caption, where the stream behind a layer was looked at."""
    fit = of(rows, "fit", scope="all")
    if fit.empty or not fit["site"].str.endswith(STREAM).any():
        return []
    return [("Behind the last layer: R² and, in parentheses, that less the untrained model's.", fit_table(rows))]


def fit_table(rows: pd.DataFrame) -> pd.DataFrame:
    """R² of every target behind the last layer, beside its selectivity, one column per model."""
    fit = of(rows, "fit", scope="all")
    fit = fit[fit["site"].str.endswith(STREAM)]
    fit = fit[fit["site"].map(depth) == fit["site"].map(depth).max()].set_index(["target", "model"])
    r2 = fit[(fit["control"] == "none") & (fit["metric"] == "r2")]["value"]
    gained = fit[(fit["control"] == "untrained") & (fit["metric"] == "selectivity")]["value"]
    encodings = list(dict.fromkeys(r2.index.get_level_values("model")))
    found = [
        {"target": target}
        | {e: beside(r2[target, e], gained[target, e], "less untrained", other_form="{:+.3f}") for e in encodings}
        for target in dict.fromkeys(r2.index.get_level_values("target"))
    ]
    return by_model(found, ["target", *encodings])


def depth(site: str) -> int:
    """A site's layer, -1 for what stands before all layers."""
    return int(site.split(".")[1]) if site.startswith("blocks.") else -1


PART = Part(("probe", "fit", "extrapolation", "over_training"), figures, section, lines)
