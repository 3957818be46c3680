"""Models compared with each other by their attention."""

from collections.abc import Callable, Sequence

import pandas as pd

from probe.attention import compare_models, compare_templates, compare_to
from probe.measure.base import Case, Measurement, Needs
from probe.measure.templates import own_t5
from probe.models.anatomy import n_heads_of
from probe.tracing import PATTERN, Trace, trace

Traces = dict[str, list[Trace]]


def model_distance(cases: Sequence[Case]) -> pd.DataFrame:
    """The distance between every two models, and between the trainings of one, of models and of their twins."""

    def distances(traces: Traces) -> pd.DataFrame:
        found = [compare_models(traces, aggregate=a, seed=cases[0].seed) for a in ("minimum", "matching")]
        return pd.concat(found, ignore_index=True)

    return _of_both(cases, distances)


def model_order(cases: Sequence[Case]) -> pd.DataFrame:
    """Which of two other models each model is nearer to, of models and of their twins."""

    def orders(traces: Traces) -> pd.DataFrame:
        found = [compare_to(traces, name, seed=cases[0].seed) for name in traces]
        return pd.concat(found, ignore_index=True)

    return _of_both(cases, orders)


def trained_t5(cases: Sequence[Case]) -> pd.DataFrame:
    """How far every model is from the table that the first model with T5's encoding has learned."""
    owner = next(case for case in cases if own_t5(case.model))

    def distances(traces: Traces) -> pd.DataFrame:
        found = []
        for case in cases:
            if n_heads_of(case.model) == n_heads_of(owner.model):
                rows = compare_templates(traces[case.name][0], ["t5"], **own_t5(owner.model), seed=case.seed)
                found.append(rows.assign(model=case.name, encoding=case.encoding, table=owner.name))
        return pd.concat(found, ignore_index=True)

    return _of_both(cases, distances)


def _without_t5(cases: Sequence[Case]) -> str | None:
    return None if any(own_t5(case.model) for case in cases) else "it needs a model with T5's encoding"


def _of_both(cases: Sequence[Case], measure: Callable[[Traces], pd.DataFrame]) -> pd.DataFrame:
    parts = []
    for control in ("none", "untrained"):
        models = {case.name: case.models if control == "none" else case.twins for case in cases}
        traces = {name: [trace(m, cases[0].tokens, [PATTERN]) for m in of] for name, of in models.items()}
        parts.append(measure(traces).assign(control=control))
    return pd.concat(parts, ignore_index=True)


MODEL_DISTANCE = Measurement(
    "the distance between the attention of every two models",
    "one pass of every model and twin, all pairs of heads",
    model_distance,
    "models",
    Needs(models=2, patterns=True),
    between=True,
)
MODEL_ORDER = Measurement(
    "which of two other models each model is nearer to",
    "one pass of every model and twin, all pairs of heads",
    model_order,
    "models",
    Needs(models=3, patterns=True),
    between=True,
)
TRAINED_T5 = Measurement(
    "how far every model is from the bias that a T5 model has learned",
    "one pass of every model and twin",
    trained_t5,
    "templates",
    Needs(models=2, patterns=True),
    refuses=_without_t5,
    also="a model with T5's encoding among them",
    between=True,
)
