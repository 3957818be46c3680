"""What attention patterns look like: distances between them, and the templates that position alone would make."""

from probe.attention.comparison import compare_models, compare_templates, nearest_template
from probe.attention.decomposition import ScoreSplit, split_queries_and_keys, split_scores
from probe.attention.distances import (
    DISTANCES,
    check_pattern,
    hellinger,
    jensen_shannon,
    mcgill_compat,
    pattern_distance,
    symmetric_kl,
    total_variation,
    wasserstein,
)
from probe.attention.maps import attention_maps
from probe.attention.templates import TEMPLATES, FittedTemplate, Template, TemplateContext, available_templates

__all__ = [
    "DISTANCES",
    "TEMPLATES",
    "FittedTemplate",
    "ScoreSplit",
    "Template",
    "TemplateContext",
    "attention_maps",
    "available_templates",
    "check_pattern",
    "compare_models",
    "compare_templates",
    "hellinger",
    "jensen_shannon",
    "mcgill_compat",
    "nearest_template",
    "pattern_distance",
    "split_queries_and_keys",
    "split_scores",
    "symmetric_kl",
    "total_variation",
    "wasserstein",
]
