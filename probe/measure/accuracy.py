"""Exact match by length."""

import pandas as pd

from probe.measure.base import Case, Measurement, Needs
from probe.training import exact_match, predict


def accuracy(case: Case) -> pd.DataFrame:
    """Exact match by length, of both held-out splits, of every training."""
    examples, parts = case.examples, []
    assert examples is not None  # NEEDS says so
    for replica, model in enumerate(case.models):
        for split in ("validation", "test"):
            of = getattr(examples.splits, split)
            if of:
                rows = exact_match(predict(model, of, examples.task.vocabulary, task=examples.task))
                parts.append(rows.assign(split=split, replica=replica))
    return pd.concat(parts, ignore_index=True)


ACCURACY = Measurement(
    "exact match by length, on trained lengths and beyond",
    "decodes every held-out example",
    accuracy,
    "accuracy",
    Needs(examples=True),
)
