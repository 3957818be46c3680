"""What attention patterns look like: distances between them, and the templates that position alone would make."""

from probe.attention.comparison import compare_templates, nearest_template
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
from probe.attention.fitted_distance import distance_from_template
from probe.attention.head_census import census, census_table
from probe.attention.head_pairs import head_pair_distances
from probe.attention.hybrids import attention_on, by_layer_encoding
from probe.attention.maps import attention_maps
from probe.attention.model_distance import AGGREGATES, compare_models, compare_to
from probe.attention.pooling import pool, pooled_pattern
from probe.attention.score_split.decomposition import ScoreSplit, split_long_context, split_scores, split_sums
from probe.attention.streaming.long_context import LongContext, compare_long_context
from probe.attention.streaming.models import ModelStream, attention_inputs, stream
from probe.attention.streaming.statistics import Divergence, StreamedAttention, stream_attention
from probe.attention.streaming.template import StreamTemplate
from probe.attention.summary import attention_summary
from probe.attention.templates import (
    TEMPLATES,
    FittedTemplate,
    Kernel,
    Observed,
    Template,
    TemplateContext,
    available_templates,
)
from probe.models.protocol import AttentionInputs

__all__ = [
    "AGGREGATES",
    "DISTANCES",
    "TEMPLATES",
    "AttentionInputs",
    "Divergence",
    "FittedTemplate",
    "Kernel",
    "LongContext",
    "ModelStream",
    "Observed",
    "ScoreSplit",
    "StreamTemplate",
    "StreamedAttention",
    "Template",
    "TemplateContext",
    "attention_inputs",
    "attention_maps",
    "attention_on",
    "attention_summary",
    "available_templates",
    "by_layer_encoding",
    "census",
    "census_table",
    "check_pattern",
    "compare_long_context",
    "compare_models",
    "compare_templates",
    "compare_to",
    "distance_from_template",
    "head_pair_distances",
    "hellinger",
    "jensen_shannon",
    "mcgill_compat",
    "nearest_template",
    "pattern_distance",
    "pool",
    "pooled_pattern",
    "split_long_context",
    "split_scores",
    "split_sums",
    "stream",
    "stream_attention",
    "symmetric_kl",
    "total_variation",
    "wasserstein",
]
