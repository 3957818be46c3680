"""Rows -> figures -> page."""

from probe.report.constructions import (
    construction_errors,
    construction_matrices,
    construction_portrait,
    learned_heads,
)
from probe.report.figures import (
    accuracy_by_length,
    attention_maps,
    distance_matrix,
    probe_by_site,
    template_distances,
)
from probe.report.page import Section, render_page

__all__ = [
    "Section",
    "accuracy_by_length",
    "attention_maps",
    "construction_errors",
    "construction_matrices",
    "construction_portrait",
    "distance_matrix",
    "learned_heads",
    "probe_by_site",
    "render_page",
    "template_distances",
]
