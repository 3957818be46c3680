"""The geometry of position in hidden states."""

import pandas as pd
import plotly.graph_objects as go

from probe.report.drawing import short_site
from probe.report.geometry import plot_variance_against_position, plot_variance_shares
from probe.report.page import Section
from probe.report.sections.base import Figures, Part, Results, shown
from probe.report.tables import beside_untrained, of

SHARES = ("share_position", "share_context", "share_token", "share_residual", "participation_ratio")
VARIANCES = ("variance", "exponent", "exponent_r2")


def figures(results: Results) -> dict[str, go.Figure]:
    """Of one model, NoPE's where there is one; the tables have all."""
    rows = results.of("geometry", model=results.portrayed)
    if rows.empty:
        return {}
    return {
        "variance_shares": plot_variance_shares(rows[rows["metric"].isin(SHARES)]),
        "variance_by_position": plot_variance_against_position(rows[rows["metric"].isin(VARIANCES)]),
    }


def section(results: Results, drawn: Figures) -> Section:
    whose, rows = results.portrayed, results.rows
    return Section(
        "The geometry of position",
        [
            "Hidden states split into their mean, a part that the position fixes, one that the sequence fixes, one "
            "that the token fixes, and the rest (Song & Zhong 2023); the number over a bar is the dimension of the "
            "position part (participation ratio). Below, the variance of attention outputs over sequences against the "
            "number of keys: for the mean of n independent values it falls as 1/n, exponent 1 (Chi et al. 2023), at "
            "initialisation, too. Position 0 is left out."
        ],
        figures=shown(
            drawn,
            {
                "variance_shares": f"Shares of the variance of hidden states. Model: {whose}.",
                "variance_by_position": f"Variance of attention outputs. Model: {whose}.",
            },
        ),
        tables=[
            (
                "The position part's share of the variance, in parentheses the untrained model's.",
                _by_site(rows, "share_position"),
            ),
            (
                "The exponent of the variance of attention outputs, in parentheses untrained.",
                _by_site(rows, "exponent"),
            ),
        ]
        if len(results.of("geometry"))
        else [],
    )


def _by_site(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A number of the geometry by site, one column per model."""
    values = of(rows, "geometry", metric=metric)
    return beside_untrained(values.assign(site=values["site"].map(short_site)), "site")


PART = Part(("geometry",), figures, section)
