"""How far attention is from a template, and two models' attention from one another, as tidy rows with intervals."""

import itertools
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from probe.attention.bootstrap import Bootstrap
from probe.attention.distances import DISTANCES, check_pattern, pattern_distance, valid_rows
from probe.attention.templates import TEMPLATES, TemplateContext, available_templates
from probe.errors import ProbeError, unknown_name
from probe.tracing import Trace

# The columns of compare_templates that say what was found; all others say of what.
_FOUND = ("template", "value", "low", "high", "n", "n_parameters", "slope")


def compare_templates(
    trace: Trace,
    templates: Sequence[str] | None = None,
    distances: Sequence[str] = ("jensen_shannon",),
    *,
    t5_table: Float[Tensor, "n_buckets head"] | None = None,
    t5_max_distance: int = 128,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The distance D of every head's attention from every template.

    Templates are fitted on the first half of the sequences (n // 2), and all of them, fitted or not, are measured on
    the other half. ``value`` is the mean over those sequences of D(observed, template), see ``pattern_distance``;
    ``low`` and ``high`` its percentile bootstrap interval over sequences, the fitted template held fixed. Units and
    ranges are the distance's; infinite values stay infinite.

    Args:
        trace: patterns of every layer, of 2 sequences or more. Rows beyond a sequence's length do not count; rows are
            divided by their sum, which takes out the rounding of the model's dtype.
        templates: names in ``TEMPLATES``; by default all, "t5" only with a table.
        distances: names in ``DISTANCES``.
        t5_table: the trained T5 bias for the template "t5", the same for all layers; ``t5_max_distance`` goes with it.
        n_bootstrap, confidence, seed: number of draws, coverage in (0, 1), seed of the draws.

    Returns:
        Columns layer, head, template, distance, value, low, high, n (sequences measured), n_parameters (fitted, per
        head) and slope (ALiBi's, in nats per token; NaN for templates that have none).

    Raises:
        ProbeError: for fewer than 2 sequences, unknown names, a "t5" without a table or with one that does not fit, or
            values that are no attention patterns.
    """
    context = TemplateContext(t5_table, t5_max_distance)
    templates = available_templates(context) if templates is None else templates
    _check_names("template", templates, TEMPLATES)
    _check_names("distance", distances, DISTANCES)
    fitted_on, measured_on = halves(trace)
    lengths = trace.lengths[measured_on]
    bootstrap = Bootstrap.draw(len(lengths), n_bootstrap, confidence, seed)
    rows = []
    for layer in range(trace.n_layers):
        pattern = checked_pattern(trace, layer)
        for name in templates:
            template = TEMPLATES[name](pattern[fitted_on], trace.lengths[fitted_on], context)
            for distance in distances:
                each = pattern_distance(pattern[measured_on], template.pattern[None], distance, lengths)
                low, high = bootstrap.interval(bootstrap.means(each))
                rows.append(
                    pd.DataFrame(
                        {
                            "layer": layer,
                            "head": range(pattern.shape[1]),
                            "template": name,
                            "distance": distance,
                            "value": each.mean(0).numpy(),
                            "low": low.numpy(),
                            "high": high.numpy(),
                            "n": len(lengths),
                            "n_parameters": template.n_parameters,
                            "slope": template.parameters.get("slope", torch.full(each.shape[1:], torch.nan)).numpy(),
                        }
                    )
                )
    return pd.concat(rows).sort_values(["layer", "head"], kind="stable", ignore_index=True)


def nearest_template(rows: pd.DataFrame, distance: str = "jensen_shannon") -> pd.DataFrame:
    """The rows of ``compare_templates`` with the smallest value, one for each layer and head.

    Columns that were added to the rows (model, seed, …) are keys like layer and head. Of equal values the first counts.
    Templates with fitted parameters have an advantage; leave them out of ``rows`` where it is unwanted.

    Raises:
        ProbeError: if there are no rows of that distance.
    """
    of_distance = rows[rows["distance"] == distance].reset_index(drop=True)
    if of_distance.empty:
        raise unknown_name("distance in these rows", distance, rows["distance"].unique())
    keys = [column for column in rows.columns if column not in _FOUND]
    best = of_distance.groupby(keys, sort=False, dropna=False)["value"].idxmin()
    return of_distance.loc[best].reset_index(drop=True)


def compare_models(
    traces: Mapping[str, Trace],
    distance: str = "jensen_shannon",
    *,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The distance between the attention of each two models on the same sequences. Kazemnejad et al. 2023, §5.2.

    At layer l it is min over all head pairs (h, h′) ∈ H × H′ of the mean over sequences of D(P_h, Q_h′), see
    ``pattern_distance``; for the models it is the mean over layers. Unit and range are the distance's. (The authors'
    released code differs: ``mcgill_compat`` says how, and it leaves out pairs with h ≥ h′.)

    ``low`` and ``high`` are the percentile bootstrap interval over sequences, the minimum taken anew in each draw. A
    minimum of noisy means is biased downward, and so is the interval; it narrows as sequences are added.

    Args:
        traces: patterns of every layer, by model name; numbers of heads may differ.
        distance: a name in ``DISTANCES``.
        n_bootstrap, confidence, seed: number of draws, coverage in (0, 1), seed of the draws.

    Returns:
        Columns model_a, model_b (each unordered pair once), scope ("layer" or "mean"), layer, head_a, head_b (the
        nearest pair; these three are missing where scope is "mean"), distance, value, low, high, n (sequences).

    Raises:
        ProbeError: for fewer than 2 models, models of different numbers of layers, traces of different sequences, an
            unknown distance, or values that are no attention patterns.
    """
    _check_names("distance", [distance], DISTANCES)
    if len(traces) < 2:
        raise ProbeError(f"a comparison wants at least 2 models, got {len(traces)}: {', '.join(traces) or 'none'}")
    first = next(iter(traces))
    for name, trace in traces.items():
        _check_comparable(first, traces[first], name, trace)
    n, lengths = len(traces[first].tokens), traces[first].lengths
    bootstrap = Bootstrap.draw(n, n_bootstrap, confidence, seed)
    rows: list[dict] = []
    for (name_a, a), (name_b, b) in itertools.combinations(traces.items(), 2):
        pair = {"model_a": name_a, "model_b": name_b}
        values, draws = [], []
        for layer in range(a.n_layers):
            pattern_a = checked_pattern(a, layer, f"model {name_a!r}, ")
            pattern_b = checked_pattern(b, layer, f"model {name_b!r}, ")
            each = _head_pairs(pattern_a, pattern_b, distance, lengths)
            mean = each.mean(0)
            head_a, head_b = divmod(int(mean.argmin()), mean.shape[1])
            values.append(mean[head_a, head_b])
            draws.append(bootstrap.means(each).flatten(1).amin(1))
            heads = {"head_a": head_a, "head_b": head_b}
            rows.append(pair | {"scope": "layer", "layer": layer} | heads | _measured(values[-1], draws[-1], bootstrap))
        overall = _measured(torch.stack(values).mean(), torch.stack(draws).mean(0), bootstrap)
        rows.append(pair | {"scope": "mean", "layer": pd.NA, "head_a": pd.NA, "head_b": pd.NA} | overall)
    frame = pd.DataFrame(rows).assign(n=n)
    frame.insert(frame.columns.get_loc("value"), "distance", distance)
    return frame.astype({"layer": "Int64", "head_a": "Int64", "head_b": "Int64"})


def _head_pairs(
    a: Float64[Tensor, "batch head_a query key"],
    b: Float64[Tensor, "batch head_b query key"],
    distance: str,
    lengths: Tensor,
) -> Float64[Tensor, "batch head_a head_b"]:
    """D of each sequence and each two heads, one head of ``a`` at a time."""
    return torch.stack([pattern_distance(head, b, distance, lengths) for head in a.split(1, dim=1)], dim=1)


def _measured(value: Tensor, draws: Tensor, bootstrap: Bootstrap) -> dict[str, float]:
    low, high = bootstrap.interval(draws)
    return {"value": float(value), "low": float(low), "high": float(high)}


def halves(trace: Trace) -> tuple[slice, slice]:
    """The sequences on which templates are fitted (the first n // 2), and those on which they are measured."""
    n = len(trace.tokens)
    if n < 2:
        raise ProbeError(f"templates want at least 2 sequences, one to fit on and one to measure, got {n}")
    return slice(0, n // 2), slice(n // 2, n)


def checked_pattern(trace: Trace, layer: int, of: str = "") -> Float64[Tensor, "batch head query key"]:
    """A layer's pattern, checked, in float64, its rows divided by their sum, with zeros in the rows of the padding."""
    pattern = trace.pattern(layer)
    try:
        check_pattern(pattern, trace.lengths)
    except ProbeError as error:
        raise ProbeError(f"{of}layer {layer}: {error}") from None
    valid = valid_rows(trace.lengths, pattern.shape[-1])[:, None, :, None]
    pattern = pattern.double().where(valid, 0.0)
    return pattern / pattern.sum(-1, keepdim=True).where(valid, 1.0)


def _check_names(kind: str, names: Sequence[str], known: Mapping[str, object]) -> None:
    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known)
    if not names:
        raise ProbeError(f"at least one {kind} is wanted, got none; known: {', '.join(sorted(known))}")


def _check_comparable(name_a: str, a: Trace, name_b: str, b: Trace) -> None:
    if a.n_layers != b.n_layers:
        raise ProbeError(
            f"models are compared layer by layer, but {name_a!r} has {a.n_layers} layers and {name_b!r} {b.n_layers}"
        )
    if a.tokens.shape != b.tokens.shape:
        shapes = f"{tuple(a.tokens.shape)} and {tuple(b.tokens.shape)}"
        raise ProbeError(f"{name_a!r} and {name_b!r} must be traced on the same tokens, got shapes {shapes}")
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
