"""Attention maps as rows: each head's mean pattern beside its nearest template, ready to be drawn."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from probe.attention.comparison import checked_pattern, compare_templates, halves, nearest_template
from probe.attention.distances import valid_rows
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
    fitted_on, measured_on = halves(trace)
    # How many of the measured sequences reach each row; padding rows are zero and add nothing to the sums.
    reached = valid_rows(trace.lengths[measured_on], trace.tokens.shape[1]).sum(0)
    longest = int((reached > 0).sum())
    parts = []
    for best in nearest_template(rows).itertuples():
        pattern = checked_pattern(trace, best.layer)
        template = TEMPLATES[best.template](pattern[fitted_on], trace.lengths[fitted_on], context)
        mean = pattern[measured_on, best.head].sum(0)[:longest] / reached[:longest, None]
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
