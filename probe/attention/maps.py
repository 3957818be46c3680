"""Attention maps as rows: each head's mean pattern beside its nearest template, ready to be drawn."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from probe.attention.comparison import checked_pattern, compare_templates, halves, nearest_template
from probe.attention.pooling import bin_starts, pool, pool_rows
from probe.attention.templates import TEMPLATES, Observed, TemplateContext
from probe.rows import SINK
from probe.sequences import valid_rows
from probe.tracing import Trace, distinct


def attention_maps(
    trace: Trace,
    templates: Sequence[str] | None = None,
    *,
    t5_table: Float[Tensor, "n_buckets head"] | None = None,
    t5_max_distance: int = 128,
    bins: int = 512,
) -> pd.DataFrame:
    """The mean pattern of every head and its nearest template by Jensen–Shannon divergence.

    As in ``compare_templates``, templates are fitted on the first half of the sequences; the mean pattern and the
    distance are those of the other half. (The distance is a mean over sequences, not that of the mean pattern.)

    Maps of more than ``bins`` positions are pooled to that many (see ``pool``); a page of many wants fewer.

    Returns:
        One row for each key that a query sees: layer, head, template, template_distance (nats), query, key (0-based
        positions; the first of its bin where maps are pooled), pattern, template_pattern. Rows of the pattern beyond
        all lengths are left out. In a layer with a learned sink, the sink is one more key, -1.

    Raises:
        ProbeError: as ``compare_templates``.
    """
    trace = distinct(trace)
    rows = compare_templates(
        trace, templates, t5_table=t5_table, t5_max_distance=t5_max_distance, nulls=False, n_bootstrap=1
    )
    context = TemplateContext(t5_table, t5_max_distance)
    fitted_on, measured_on = halves(trace)
    # How many of the measured sequences reach each row; padding rows are zero and add nothing to the sums.
    reached = valid_rows(trace.lengths[measured_on], trace.tokens.shape[1]).sum(0)
    longest = int((reached > 0).sum())
    parts = []
    starts = bin_starts(longest, bins)
    query, key = torch.tril_indices(len(starts), len(starts))
    for layer, heads in nearest_template(rows).groupby("layer"):
        pattern = checked_pattern(trace, layer)
        observed = Observed(pattern[fitted_on], trace.lengths[fitted_on], trace.n_visible(layer), layer in trace.sinks)
        fitted = {name: TEMPLATES[name].of(observed, context).pattern for name in heads["template"].unique()}
        mean = pool((pattern[measured_on].sum(0)[:, :longest] / reached[:longest, None])[..., :longest], bins)
        sink = trace.sink_mass(layer)[measured_on].sum(0)[:, :longest] / reached[:longest]
        for best in heads.itertuples():
            template = pool(fitted[best.template][best.head, :longest, :longest], bins)
            of = {"layer": layer, "head": best.head, "template": best.template, "template_distance": best.value}
            on_tokens = {
                "query": starts[query].numpy(),
                "key": starts[key].numpy(),
                "pattern": mean[best.head, query, key].numpy(),
                "template_pattern": template[query, key].numpy(),
            }
            parts.append(pd.DataFrame(of | on_tokens))
            if layer in trace.sinks:
                given = 1 - fitted[best.template][best.head, :longest].sum(-1)
                shares = {
                    "pattern": pool_rows(sink[best.head], bins).numpy(),
                    "template_pattern": pool_rows(given, bins).numpy(),
                }
                parts.append(pd.DataFrame(of | {"query": starts.numpy(), "key": SINK} | shares))
    return pd.concat(parts, ignore_index=True)
