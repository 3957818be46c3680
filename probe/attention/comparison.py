"""How far each head's attention is from the templates, as tidy rows with intervals."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from probe.attention.distances import DISTANCES, check_pattern, pattern_distance
from probe.attention.nulls import nearest_head_distance, shuffled
from probe.attention.templates import TEMPLATES, Observed, TemplateContext, available_templates
from probe.errors import ProbeError, unknown_name
from probe.sequences import valid_rows
from probe.statistics import N_BOOTSTRAP, Bootstrap
from probe.tracing import PATTERN, Trace, distinct

# The columns of compare_templates that say what was found; all others say of what.
_FOUND = (
    *("template", "value", "low", "high", "n", "n_parameters", "slope", "explained", "null_uniform"),
    *("null_shuffled", "null_shuffled_low", "null_shuffled_high", "null_seed", "null_seed_low", "null_seed_high"),
)
# A head this near to uniform attention has nothing to explain but the rounding of its dtype.
_NOTHING = 1e-12


def compare_templates(
    trace: Trace,
    templates: Sequence[str] | None = None,
    distances: Sequence[str] = ("jensen_shannon",),
    *,
    t5_table: Float[Tensor, "n_buckets head"] | None = None,
    t5_max_distance: int = 128,
    nulls: bool = True,
    other_seed: Trace | None = None,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The distance D of every head's attention from every template.

    Templates are fitted on the first half of the sequences (n // 2), and all of them, fitted or not, are measured on
    the other half: a template with more parameters is no nearer for having more, only where they hold for sequences
    that it has not seen. ``value`` is the mean over those sequences of D(observed, template), see ``pattern_distance``;
    ``low`` and ``high`` its bootstrap interval over sequences, the fitted template held fixed. Units and
    ranges are the distance's; infinite values stay infinite.

    Args:
        trace: patterns of every layer, of 2 distinct sequences or more. Rows beyond a sequence's length do not count;
            rows are divided by their sum, which takes out the rounding of the model's dtype.
        templates: names in ``TEMPLATES``; by default all, "t5" only with a table.
        distances: names in ``DISTANCES``.
        t5_table: the trained T5 bias for the template "t5", the same for all layers; ``t5_max_distance`` goes with it.
        nulls: whether to measure what ``value`` is to be held against.
        other_seed: another seed of the same model on the same sequences, for ``null_seed``.
        n_bootstrap, confidence, seed: number of draws, coverage in (0, 1), seed of the draws and of the shuffling.

    Returns:
        Columns layer, head, template, metric (which distance), value, low, high, n (sequences measured), n_parameters
        (fitted, per head), slope (ALiBi's, in nats per token; NaN for templates that have none), and explained: the
        share 1 - D(observed, template)/D(observed, uniform) of the distance from uniform attention that the template
        explains, 1 at most; negative where it is further than uniform, NaN where there is nothing to explain (below
        1e-12, as in sequences of length 1) or infinitely much.

        With ``nulls``, in the unit of ``value`` and from the same draws of the same sequences:
        null_uniform: the distance from the uniform pattern.
        null_shuffled, null_shuffled_low, null_shuffled_high: the distance of the same patterns, the keys of every row
        shuffled, from the template that was fitted to shuffled patterns: what heads as sharp would have without an
        order of keys.
        null_seed, null_seed_low, null_seed_high: the distance from the nearest head of ``other_seed`` in the same
        layer, chosen on the first half: as near as training the same model again comes. NaN without ``other_seed``.

    Raises:
        ProbeError: for fewer than 2 distinct sequences, unknown names, a "t5" without a table or with one that does not
            fit, another seed that does not fit, or values that are no attention patterns.
    """
    trace = distinct(trace)
    context = TemplateContext(t5_table, t5_max_distance)
    templates = available_templates(context) if templates is None else templates
    check_names("template", templates, TEMPLATES)
    check_names("distance", distances, DISTANCES)
    fitted_on, measured_on = halves(trace)
    if other_seed is not None:
        other_seed = distinct(other_seed, "other_seed")
        check_comparable("the trace", trace, "the other seed", other_seed)
    n, lengths = len(trace.lengths[measured_on]), trace.lengths
    reached = (..., slice(int(lengths.max())), slice(int(lengths.max())))  # no parameter is of the padding
    bootstrap = Bootstrap.draw(n, n_bootstrap, confidence, seed)
    generator = np.random.default_rng(seed)

    def measured(column: str, each: Float64[Tensor, "sequence head"]) -> dict[str, np.ndarray]:
        low, high = bootstrap.interval(bootstrap.means(each))
        prefix = "" if column == "value" else f"{column}_"
        return {column: each.mean(0).numpy(), f"{prefix}low": low.numpy(), f"{prefix}high": high.numpy()}

    rows = []
    for layer in trace.layers_at(PATTERN):
        pattern, n_visible = checked_pattern(trace, layer)[reached], trace.n_visible(layer)[reached[-1]]
        sink = layer in trace.sinks
        observed, held_out = Observed(pattern[fitted_on], lengths[fitted_on], n_visible, sink), pattern[measured_on]
        uniform = TEMPLATES["uniform"].of(observed, context).pattern
        if nulls:
            shuffle = shuffled(pattern, n_visible, generator)
            shuffled_observed = Observed(shuffle[fitted_on], lengths[fitted_on], n_visible, sink)
            shuffled_held_out = shuffle[measured_on]
        of_uniform, of_seed = {}, {}
        for distance in distances:
            each = pattern_distance(held_out, uniform[None], distance, lengths[measured_on], sink=sink)
            of_uniform[distance] = each.mean(0)
            if nulls:
                of_seed[distance] = torch.full_like(each, torch.nan)
                if other_seed is not None:
                    other = checked_pattern(other_seed, layer, "the other seed, ")[reached]
                    of_seed[distance] = nearest_head_distance(
                        pattern, other, lengths, fitted_on, measured_on, distance, sink
                    )
        for name in templates:
            template = TEMPLATES[name].of(observed, context)
            if nulls:
                of_shuffled = TEMPLATES[name].of(shuffled_observed, context).pattern[None]
            for distance in distances:
                each = pattern_distance(held_out, template.pattern[None], distance, lengths[measured_on], sink=sink)
                far = of_uniform[distance]
                explained = (1 - each.mean(0) / far).where((far > _NOTHING) & far.isfinite(), torch.nan)
                found = (
                    {"layer": layer, "head": range(pattern.shape[1]), "template": name, "metric": distance}
                    | measured("value", each)
                    | {
                        "n": n,
                        "n_parameters": template.n_parameters,
                        "slope": template.parameters.get("slope", torch.full_like(far, torch.nan)).numpy(),
                        "explained": explained.numpy(),
                    }
                )
                if nulls:
                    each = pattern_distance(shuffled_held_out, of_shuffled, distance, lengths[measured_on], sink=sink)
                    found |= {"null_uniform": far.numpy()} | measured("null_shuffled", each)
                    found |= measured("null_seed", of_seed[distance])
                rows.append(pd.DataFrame(found))
    return pd.concat(rows).sort_values(["layer", "head"], kind="stable", ignore_index=True)


def nearest_template(rows: pd.DataFrame, distance: str = "jensen_shannon") -> pd.DataFrame:
    """The rows of ``compare_templates`` with the smallest value, one for each layer and head.

    Columns that were added to the rows (model, seed, …) are keys like layer and head. Of equal values the first counts.
    All values are of held-out sequences, so that templates of different ``n_parameters``, a column that stays in the
    rows, can be held against each other.

    Raises:
        ProbeError: if there are no rows of that distance.
    """
    of_distance = rows[rows["metric"] == distance].reset_index(drop=True)
    if of_distance.empty:
        raise unknown_name("distance in these rows", distance, rows["metric"].unique())
    keys = [column for column in rows.columns if column not in _FOUND]
    best = of_distance.groupby(keys, sort=False, dropna=False)["value"].idxmin()
    return of_distance.loc[best].reset_index(drop=True)


def halves(trace: Trace) -> tuple[slice, slice]:
    """The sequences on which templates are fitted (the first n // 2), and those on which they are measured."""
    n = len(trace.tokens)
    if n < 2:
        raise ProbeError(f"templates need at least 2 distinct sequences, one to fit and one to measure, got {n}")
    return slice(0, n // 2), slice(n // 2, n)


def checked_pattern(trace: Trace, layer: int, of: str = "") -> Float64[Tensor, "batch head query key"]:
    """A layer's pattern, checked, in float64, its rows divided by their sum, with zeros in the rows of the padding.

    Rows of a layer with a learned sink are as they are: they sum to 1 less its share.
    """
    pattern, sink = trace.pattern(layer), layer in trace.sinks
    try:
        check_pattern(pattern, trace.lengths, sink=sink)
    except ProbeError as error:
        raise ProbeError(f"{of}layer {layer}: {error}") from None
    valid = valid_rows(trace.lengths, pattern.shape[-1])[:, None, :, None]
    pattern = pattern.double().where(valid, 0.0)
    if sink:
        return pattern
    return pattern / pattern.sum(-1, keepdim=True).where(valid, 1.0)


def check_names(kind: str, names: Sequence[str], known: Mapping[str, object]) -> None:
    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known)
    if not names:
        raise ProbeError(f"at least one {kind} is wanted, got none; known: {', '.join(sorted(known))}")


def check_comparable(name_a: str, a: Trace, name_b: str, b: Trace) -> None:
    if a.n_layers != b.n_layers:
        raise ProbeError(
            f"models are compared layer by layer, but {name_a!r} has {a.n_layers} layers and {name_b!r} {b.n_layers}"
        )
    layers_a, layers_b = a.layers_at(PATTERN), b.layers_at(PATTERN)
    if layers_a != layers_b:
        raise ProbeError(
            f"models are compared layer by layer, but {name_a!r} has patterns in layers {layers_a} and {name_b!r} in "
            f"{layers_b}"
        )
    if a.tokens.shape != b.tokens.shape:
        shapes = f"{tuple(a.tokens.shape)} and {tuple(b.tokens.shape)}"
        raise ProbeError(f"{name_a!r} and {name_b!r} must be traced on the same tokens, got shapes {shapes}")
    if a.sinks != b.sinks:
        raise ProbeError(
            f"{name_a!r} has learned sinks in layers {sorted(a.sinks)} and {name_b!r} in {sorted(b.sinks)}: a sink "
            "is a key, and models are compared on the same keys"
        )
    if not torch.equal(a.lengths, b.lengths):
        where = int((a.lengths != b.lengths).nonzero()[0])
        raise ProbeError(
            f"{name_a!r} and {name_b!r} must be traced with the same lengths, but those of sequence {where} are "
            f"{int(a.lengths[where])} and {int(b.lengths[where])}"
        )
    differs = (a.tokens != b.tokens) & valid_rows(a.lengths, a.tokens.shape[1])
    if differs.any():
        sequence, position = differs.nonzero()[0].tolist()
        raise ProbeError(
            f"{name_a!r} and {name_b!r} must be traced on the same tokens, but sequence {sequence} differs at position "
            f"{position}: {int(a.tokens[sequence, position])} and {int(b.tokens[sequence, position])}"
        )
