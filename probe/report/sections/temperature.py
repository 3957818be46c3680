"""Attention temperatures."""

import pandas as pd
import plotly.graph_objects as go

from probe.report.page import Section
from probe.report.scales import (
    PUBLISHED_SLOPE,
    SPLITS,
    TEMPERATURES,
    beside_entropy,
    plot_entropy_by_position,
    plot_loss_by_temperature,
    plot_scale_against_entropy,
    plot_scale_law,
    plot_scale_map,
)
from probe.report.sections.base import Figures, Part, Results, shown
from probe.report.tables import interval_of, of


def figures(results: Results) -> dict[str, go.Figure]:
    rows, found = results.rows, {}
    scales = results.of("head_scale", metric="scale")
    if len(scales) and (scales["variant"] == "head").any():
        found["scale_map"] = plot_scale_map(rows)
    if len(scales) and scales["extension"].notna().any():
        found["scale_law"] = plot_scale_law(rows)
    entropy = results.of("scaled_entropy", metric="entropy")
    if len(entropy):
        found["entropy_by_position"] = plot_entropy_by_position(rows, results.trained_or_least(entropy["query"]))
    if len(results.of("scale_entropy")) and len(beside_entropy(rows)):
        found["scale_entropy"] = plot_scale_against_entropy(rows)
    temperatures = results.of("temperature")
    if len(temperatures) and temperatures["metric"].isin(list(TEMPERATURES)).any():
        found["temperature"] = plot_loss_by_temperature(rows)
    return found


def section(results: Results, drawn: Figures) -> Section:
    captions = {
        "temperature": "Loss and exact match against one λ for the whole model.",
        "scale_law": "λ against the factor s by which the context is longer than the trained length.",
        "scale_map": "λ of every head; white is 1, no change.",
        "entropy_by_position": "Entropy of attention in nats, means over heads. Upright: the trained length.",
        "scale_entropy": "λ of every head against the rise of its entropy from the trained length to the extension.",
    }
    table = temperature_table(results.rows)
    return Section(
        "Attention temperature",
        [
            "softmax(λ q·k / √d): the more keys, the flatter a softmax of given scores, up to the entropy ln n of "
            "uniform attention over n keys; λ above 1 sharpens it again. Wang et al. 2024 (section 3) find "
            f"one λ that grows as 1 + a ln s, a = {PUBLISHED_SLOPE} (R² 0.977, one model without "
            "position encoding), and better ones trained for every head. λ is fitted on sequences of the length to "
            "reach and scored on others.",
            "What this cannot show: λ trained by gradients is one of many that do as well, so a single head's has no "
            "interval here; a law through few extensions fits easily; a correlation over heads (95 % bootstrap over "
            "heads, which are not independent) does not say that entropy is what λ mends. One training seed.",
        ],
        figures=shown(drawn, captions),
        tables=[
            (
                "The uniform λ of least loss, and the change from λ = 1 on the same sequences (95 % bootstrap, "
                "paired). It was picked on them, too: the change is the most that it could be.",
                table,
            )
        ]
        if len(table)
        else [],
    )


def temperature_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The uniform λ of the least loss, one row per model and split, with what it changes from λ = 1, paired."""
    loss = of(rows, "temperature", metric="loss").reset_index(drop=True)
    columns = ["model", "sequences", "best λ", "change of loss, nats", "change of exact match"]
    if loss.empty:
        return pd.DataFrame(columns=columns)
    changes = [
        of(rows, "temperature", metric=metric).set_index(["model", "split", "scale"])
        for metric in ("loss_change", "exact_match_change")
    ]
    best = loss.loc[loss.groupby(["model", "split"], sort=False)["value"].idxmin()]
    found = []
    for r in best.itertuples():
        key = (r.model, r.split, r.scale)
        cells = [interval_of(change.loc[key]) if key in change.index else "" for change in changes]
        found.append((r.model, SPLITS.get(r.split, r.split), f"{r.scale:g}", *cells))
    return pd.DataFrame(found, columns=columns)


PART = Part(("temperature", "head_scale", "scale_law", "scaled_entropy", "scale_entropy"), figures, section)
