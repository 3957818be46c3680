"""Rows -> figures -> page."""

from probe.report.accuracy import accuracy_by_length, under_shift
from probe.report.attention import (
    attention_grid,
    attention_maps,
    census_grid,
    census_losses,
    distance_matrix,
    entropy_by_query,
    f_rel_curves,
    head_grid,
    template_distances,
)
from probe.report.constructions import (
    construction_errors,
    construction_matrices,
    construction_portrait,
    learned_heads,
)
from probe.report.extrapolation import loss_by_position, passkey_by_length, passkey_map, perplexity_by_context
from probe.report.geometry import (
    channel_correlations,
    mechanism_readouts,
    position_against_loss,
    position_basis,
    similarity_by_lag,
    variance_against_position,
    variance_shares,
)
from probe.report.hybrids import attention_by_kind
from probe.report.league import league_by_length, league_differences, league_page, league_ranks
from probe.report.page import Section, render_page
from probe.report.position import erasure_losses, extrapolation_curve, loss_along_texts, probe_by_site, probe_heatmap
from probe.report.position_table import table_curves, table_map
from probe.report.scales import (
    entropy_by_position,
    loss_by_temperature,
    scale_against_entropy,
    scale_law,
    scale_map,
)
from probe.report.style import LOOKS, TEMPLATE, look

__all__ = [
    "LOOKS",
    "TEMPLATE",
    "Section",
    "accuracy_by_length",
    "attention_by_kind",
    "attention_grid",
    "attention_maps",
    "census_grid",
    "census_losses",
    "channel_correlations",
    "construction_errors",
    "construction_matrices",
    "construction_portrait",
    "distance_matrix",
    "entropy_by_position",
    "entropy_by_query",
    "erasure_losses",
    "extrapolation_curve",
    "f_rel_curves",
    "head_grid",
    "league_by_length",
    "league_differences",
    "league_page",
    "league_ranks",
    "learned_heads",
    "look",
    "loss_along_texts",
    "loss_by_position",
    "loss_by_temperature",
    "mechanism_readouts",
    "passkey_by_length",
    "passkey_map",
    "perplexity_by_context",
    "position_against_loss",
    "position_basis",
    "probe_by_site",
    "probe_heatmap",
    "render_page",
    "scale_against_entropy",
    "scale_law",
    "scale_map",
    "similarity_by_lag",
    "table_curves",
    "table_map",
    "template_distances",
    "under_shift",
    "variance_against_position",
    "variance_shares",
]
