"""Models compared with each other by their attention."""

import pandas as pd
import plotly.graph_objects as go

from probe.report import attention
from probe.report.page import Line, Section
from probe.report.sections.base import Figures, Part, Results, shown
from probe.report.sections.templates import DISTANCE
from probe.report.tables import interval_of


def figures(results: Results) -> dict[str, go.Figure]:
    found: dict[str, go.Figure] = {}
    pairs = results.of("model_distance", metric=DISTANCE, scope="mean", aggregate="minimum")
    for control, name in (("none", "model_distances"), ("untrained", "model_distances_untrained")):
        if len(pairs) and (pairs["control"] == control).any():
            found[name] = attention.plot_distance_matrix(pairs[pairs["control"] == control])
    return found


def section(results: Results, drawn: Figures) -> Section:
    captions = {
        "model_distances": "Distance between every two trained models, in nats.",
        "model_distances_untrained": "The same before training.",
    }
    figures, tables = shown(drawn, captions), []
    order = results.of("model_order", control="none")
    of_nope = results.of("model_order", control="none", reference="none")
    if len(of_nope):
        tables.append(
            ("Which model NoPE is nearer to: distance to the first less distance to the second.", order_table(of_nope))
        )
    elif len(order):
        table = order_table(order).assign(reference=order.sort_values("value")["reference"])
        tables.append(("Which model each reference is nearer to.", table))
    matched = results.of("model_distance", metric=DISTANCE, scope="mean", aggregate="matching")
    if len(matched):
        tables.append(("The same models by the best one-to-one matching of heads.", _pair_table(matched)))
    return Section(
        "Models compared",
        [
            "As in Kazemnejad et al. 2023, section 5.2: at each layer the smallest Jensen–Shannon divergence over all "
            "pairs of heads, then the mean over layers. On the diagonal, the distance between two seeds of one model, "
            "where there are two. Brackets: 95 % bootstrap over sequences and seeds, the minimum taken anew each time; "
            "with one seed they say nothing about other seeds. The paper orders models by distance from NoPE: T5, "
            "ALiBi, then rotary and absolute. The second matrix is the control: the same models before training."
        ],
        figures=figures,
        tables=tables,
    )


def lines(results: Results) -> list[Line]:
    """Which models are near to each other. Where NoPE is among them, how near the others are to it."""
    pairs = results.of("model_distance", metric=DISTANCE, scope="mean", aggregate="minimum")
    if pairs.empty:
        return []
    if "none" in {*pairs["model_a"], *pairs["model_b"]}:
        return [_nearest_to_nope(pairs)]
    pairs = pairs[pairs["control"] == "none"].sort_values("value").to_dict("records")
    text = "Distance of the attention of two models, by the nearest heads of each layer, nats (95 % bootstrap):"
    return [Line("Models", text, [f"{pair['model_a']} – {pair['model_b']} {interval_of(pair)}" for pair in pairs])]


def _nearest_to_nope(pairs: pd.DataFrame) -> Line:
    """The models in order of their distance from NoPE, and how far two seeds of NoPE are apart, which every distance
    between models has to be read beside."""
    own = pairs[(pairs["model_a"] == "none") & (pairs["model_b"] == "none") & (pairs["control"] == "none")]
    pairs = pairs[(pairs["model_a"] == "none") ^ (pairs["model_b"] == "none")].sort_values("value")
    other = pairs["model_a"].where(pairs["model_a"] != "none", pairs["model_b"])
    untrained = pairs[pairs["control"] == "untrained"].set_index(other[pairs["control"] == "untrained"])["value"]
    said = [
        f"{name} {interval_of(pair)} ({untrained[name]:.3f})"
        for name, pair in zip(other, pairs.to_dict("records"), strict=True)
        if pair["control"] == "none"
    ]
    text = (
        "By its attention patterns NoPE is nearest to these, the nearest first (Jensen–Shannon divergence, nats, 95 % "
        "bootstrap; in parentheses before training)."
    )
    if len(own):
        text += f" Two seeds of NoPE are {interval_of(own.iloc[0])} apart."
    return Line("Nearest to NoPE", text, said)


def order_table(order: pd.DataFrame) -> pd.DataFrame:
    """Every two models by their distance from NoPE, with the interval of the difference."""
    order = order.sort_values("value")
    return pd.DataFrame(
        {
            "nearer": order["model_a"].where(order["value"] <= 0, order["model_b"]),
            "than": order["model_b"].where(order["value"] <= 0, order["model_a"]),
            "by": order["value"].abs(),
            "low": order["low"].where(order["value"] > 0, -order["high"]),
            "high": order["high"].where(order["value"] > 0, -order["low"]),
        }
    )


def _pair_table(pairs: pd.DataFrame) -> pd.DataFrame:
    both = pairs.assign(pair=pairs["model_a"] + " – " + pairs["model_b"], text=pairs.apply(interval_of, axis=1))
    table = both.pivot_table(index="pair", columns="control", values="text", aggfunc="first", sort=False)
    return table.rename(columns={"none": "trained"}).rename_axis(columns=None).reset_index()


PART = Part(("model_distance", "model_order"), figures, section, lines)
