"""Hand-built weights, verified."""

import pandas as pd
import plotly.graph_objects as go

from probe.report.constructions import plot_construction_errors
from probe.report.page import Line, Section
from probe.report.sections.base import Figures, Part, Results, shown
from probe.report.tables import of


def figures(results: Results) -> dict[str, go.Figure]:
    rows = results.of("construction")
    return (
        {"constructions": plot_construction_errors(rows.rename(columns={"value": "largest_error"}))}
        if len(rows)
        else {}
    )


def section(results: Results, drawn: Figures) -> Section:
    return Section(
        "Constructions",
        [
            "Weights written by hand into the same decoder, every claim run through its forward pass. An error within "
            "the tolerance holds; the tests show that the checks fail when a weight is off by 1 % or the <bos> is "
            "missing."
        ],
        figures=shown(drawn, {"constructions": "Every check, its error as a share of its tolerance."}),
        tables=[("Claims.", construction_table(results.rows))] if drawn.get("constructions") else [],
    )


def lines(results: Results) -> list[Line]:
    claims = results.of("construction")
    if claims.empty:
        return []
    holds = int(claims["holds"].astype(bool).sum())
    return [Line("Constructions", f"Of {len(claims)} checks of hand-built weights, {holds} hold.")]


def construction_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a construction: what it claims, to what length it was checked here, and in how many checks it holds."""
    claims = of(rows, "construction").rename(columns={"value": "largest_error"})
    share = claims["largest_error"] / claims["tolerance"].where(claims["tolerance"] > 0)
    claims = claims.assign(share=share.fillna(claims["largest_error"] * float("inf")).fillna(0.0))
    return pd.DataFrame(
        [
            {
                "construction": name,
                "claim": part["claim"].iloc[0],
                "source": part["source"].iloc[0],
                "dtypes": ", ".join(dict.fromkeys(part["dtype"])),
                "checked to length": int(part["length"].max()),
                "largest error / tolerance": float(part["share"].max()),
                "holds": f"{int(part['holds'].sum())} of {len(part)}",
            }
            for name, part in claims.groupby("construction", sort=False)
        ]
    )


PART = Part(("construction",), figures, section, lines)
