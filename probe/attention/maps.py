"""Attention maps as rows: each head's mean pattern beside its nearest template, ready to be drawn."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from probe.attention.comparison import compare_templates, measured_patterns, nearest_template
from probe.attention.templates import TEMPLATES, TemplateContext
from probe.tracing import Trace


def attention_maps(
    trace: Trace,
    templates: Sequence[str] | None = None,
    *,
    t5_table: Float[Tensor, "n_buckets head"] | None = None,
    t5_max_distance: int = 128,
) -> pd.DataFrame:
    """The mean pattern of every head and its nearest template by Jensen–Shannon divergence.

    As in ``compare_templates``, templates are fitted on the first half of the sequences; the mean pattern and the
    distance are those of the other half. (The distance is a mean over sequences, not that of the mean pattern.)

    Returns:
        One row for each key that a query sees: layer, head, template, distance (nats), query, key (0-based
        positions), pattern, template_pattern. Rows of the pattern beyond all lengths are left out.

    Raises:
        ProbeError: as ``compare_templates``.
    """
    rows = compare_templates(trace, templates, t5_table=t5_table, t5_max_distance=t5_max_distance, n_bootstrap=1)
    context = TemplateContext(t5_table, t5_max_distance)
    parts = []
    for best in nearest_template(rows).itertuples():
        fitted_on, measured_on = measured_patterns(trace, best.layer)
        template = TEMPLATES[best.template](fitted_on.pattern, fitted_on.lengths, context)
        counts = torch.arange(measured_on.pattern.shape[-1]) < measured_on.lengths[:, None]
        total = counts.sum(0)
        longest = int((total > 0).sum())
        # Padding rows are zero, so the sum over sequences is the sum over those that reach the row.
        mean = measured_on.pattern[:, best.head].sum(0)[:longest] / total[:longest, None]
        query, key = torch.tril_indices(longest, longest)
        parts.append(
            pd.DataFrame(
                {
                    "layer": best.layer,
                    "head": best.head,
                    "template": best.template,
                    "distance": best.value,
                    "query": query.numpy(),
                    "key": key.numpy(),
                    "pattern": mean[query, key].numpy(),
                    "template_pattern": template.pattern[best.head, query, key].numpy(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
