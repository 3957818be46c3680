"""One attention temperature for the whole model."""

import pandas as pd

from probe.extrapolation import sweep_scale
from probe.measure.base import Case, Measurement, Needs
from probe.training import encode


def temperature(case: Case, *, most: int = 300) -> pd.DataFrame:
    """Loss and accuracy on trained lengths and on the test's under each of several λ for the whole model."""
    examples, parts = case.examples, []
    assert examples is not None  # NEEDS says so
    for split, name in (("trained", "validation"), ("longer", "test")):
        of = getattr(examples.splits, name)[:most]
        if of:
            data = encode(of, examples.task.vocabulary)
            parts.append(sweep_scale(case.model, data, batch_size=64, seed=case.seed).assign(split=split))
    return pd.concat(parts, ignore_index=True)


TEMPERATURE = Measurement(
    "loss and accuracy under one attention temperature",
    "some forward passes per temperature",
    temperature,
    "temperature",
    Needs(examples=True, scale=True),
)
