"""Rows -> figures -> page. What draws a figure begins with ``plot_``."""

from typing import TYPE_CHECKING

from probe.deprecation import old_names
from probe.report.accuracy import plot_accuracy_by_length, plot_under_shift
from probe.report.attention import (
    plot_attention_grid,
    plot_attention_maps,
    plot_census_grid,
    plot_census_losses,
    plot_distance_matrix,
    plot_entropy_by_query,
    plot_f_rel_curves,
    plot_head_grid,
    plot_template_distances,
)
from probe.report.constructions import (
    plot_construction_errors,
    plot_construction_matrices,
    plot_construction_portrait,
    plot_learned_heads,
)
from probe.report.extrapolation import (
    plot_loss_by_position,
    plot_passkey_by_length,
    plot_passkey_map,
    plot_perplexity_by_context,
)
from probe.report.geometry import (
    plot_channel_correlations,
    plot_mechanism_readouts,
    plot_position_against_loss,
    plot_position_basis,
    plot_similarity_by_lag,
    plot_variance_against_position,
    plot_variance_shares,
)
from probe.report.hybrids import plot_attention_by_kind
from probe.report.league import league_page, plot_league_by_length, plot_league_differences, plot_league_ranks
from probe.report.page import Section, render_page
from probe.report.position import (
    plot_erasure_losses,
    plot_extrapolation_curve,
    plot_loss_along_texts,
    plot_probe_by_site,
    plot_probe_heatmap,
)
from probe.report.position_table import plot_table_curves, plot_table_map
from probe.report.scales import (
    plot_entropy_by_position,
    plot_loss_by_temperature,
    plot_scale_against_entropy,
    plot_scale_law,
    plot_scale_map,
)
from probe.report.style import LOOKS, TEMPLATE, look

__all__ = [
    "LOOKS",
    "TEMPLATE",
    "Section",
    "league_page",
    "look",
    "plot_accuracy_by_length",
    "plot_attention_by_kind",
    "plot_attention_grid",
    "plot_attention_maps",
    "plot_census_grid",
    "plot_census_losses",
    "plot_channel_correlations",
    "plot_construction_errors",
    "plot_construction_matrices",
    "plot_construction_portrait",
    "plot_distance_matrix",
    "plot_entropy_by_position",
    "plot_entropy_by_query",
    "plot_erasure_losses",
    "plot_extrapolation_curve",
    "plot_f_rel_curves",
    "plot_head_grid",
    "plot_league_by_length",
    "plot_league_differences",
    "plot_league_ranks",
    "plot_learned_heads",
    "plot_loss_along_texts",
    "plot_loss_by_position",
    "plot_loss_by_temperature",
    "plot_mechanism_readouts",
    "plot_passkey_by_length",
    "plot_passkey_map",
    "plot_perplexity_by_context",
    "plot_position_against_loss",
    "plot_position_basis",
    "plot_probe_by_site",
    "plot_probe_heatmap",
    "plot_scale_against_entropy",
    "plot_scale_law",
    "plot_scale_map",
    "plot_similarity_by_lag",
    "plot_table_curves",
    "plot_table_map",
    "plot_template_distances",
    "plot_under_shift",
    "plot_variance_against_position",
    "plot_variance_shares",
    "render_page",
]

if not TYPE_CHECKING:  # types know the new names alone
    __getattr__ = old_names(
        __name__, {name.removeprefix("plot_"): name for name in __all__ if name.startswith("plot_")}
    )
