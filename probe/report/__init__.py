"""Rows -> figures -> page."""

from probe.report.attention import (
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
from probe.report.figures import accuracy_by_length, probe_by_site
from probe.report.page import Section, render_page
from probe.report.position import erasure_losses, extrapolation_curve, probe_heatmap

__all__ = [
    "Section",
    "accuracy_by_length",
    "attention_maps",
    "census_grid",
    "census_losses",
    "construction_errors",
    "construction_matrices",
    "construction_portrait",
    "distance_matrix",
    "entropy_by_query",
    "erasure_losses",
    "extrapolation_curve",
    "f_rel_curves",
    "head_grid",
    "learned_heads",
    "probe_by_site",
    "probe_heatmap",
    "render_page",
    "template_distances",
]
