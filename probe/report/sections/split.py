"""Scores split into position and content, and the entropy of attention."""

import pandas as pd
import plotly.graph_objects as go

from probe.report import attention
from probe.report.page import Section
from probe.report.sections.base import Figures, Part, Results, of_each
from probe.report.tables import beside_untrained


def figures(results: Results) -> dict[str, go.Figure]:
    found: dict[str, go.Figure] = {}
    for name, heads in results.drawings.get("curves", {}).items():
        found[f"f_rel_{name}"] = attention.plot_f_rel_curves(heads, results.of("split", model=name), name)
    entropy = results.of("entropy")
    if len(entropy):
        found["entropy"] = attention.plot_entropy_by_query(entropy)
    return found


def section(results: Results, drawn: Figures) -> Section:
    split = results.of("split")
    figures = of_each(drawn, "f_rel_")
    tables = [("Means over heads, in parentheses before training.", split_table(split))] if len(split) else []
    if "entropy" in drawn:
        figures.append(
            ("Entropy of every head by query position; uniform attention has the greatest.", drawn["entropy"])
        )
    return Section(
        "Scores split into position and content",
        [
            "Scores as μ + f_abs(key) + g(query) + f_rel(distance) + content, by least squares over all held-out "
            "sequences (theorem 2 of Kazemnejad et al. 2023 promises heads of this form). A panel is f_rel of a head, "
            "with the ALiBi line and the T5 bias nearest to it; R² is the share of the scores' variance within rows, "
            "which is all that softmax sees, that f_rel alone explains. Bands: 95 % bootstrap over sequences.",
            "A linear f_rel cannot be told from an absolute bias on keys, -m(t - i) = -mt + mi, since softmax does not "
            "see -mt: ALiBi is as well an absolute bias on keys. By convention the linear trend belongs to f_rel here.",
        ],
        figures=figures,
        tables=tables,
    )


def split_table(split: pd.DataFrame) -> pd.DataFrame:
    """Shares of variance within rows and the Toeplitz R², means over heads, a row each, one column per model."""
    names = {
        ("seen", "distance", "share"): "f_rel, share within rows",
        ("seen", "key", "share"): "f_abs, share within rows",
        ("seen", "residual", "share"): "content, share within rows",
        ("seen", "distance", "toeplitz_r2"): "R² of f_rel alone (Toeplitz)",
        ("mean", "distance", "toeplitz_r2"): "the same of mean scores",
        ("seen", "distance", "alibi_r2"): "R² of a line for f_rel",
        ("seen", "distance", "t5_r2"): "R² of T5's buckets for f_rel",
    }
    keys = pd.Series(list(zip(split["scope"], split["part"], split["metric"], strict=True)), index=split.index)
    named = split.assign(quantity=keys.map(names)).dropna(subset="quantity")
    return beside_untrained(named, "quantity")


PART = Part(("split", "entropy", "curves"), figures, section)
