"""By which mechanism a model knows position."""

import pandas as pd

from probe.measure.base import Case, Measurement, Needs
from probe.models.anatomy import layers_of
from probe.models.protocol import ATTENTION
from probe.position import MECHANISM_LENGTH, MECHANISM_SEQUENCES, name_mechanism


def mechanism(case: Case) -> pd.DataFrame:
    """The verdict on every mechanism, and its evidence, of the model and of its untrained twin."""
    return case.beside_twins(lambda _, of: name_mechanism(of[0], case.tokens, scored=case.scored, seed=case.seed))


def _not_by_attention_alone(case: Case) -> str | None:
    if all(layer.kind == ATTENTION for layer in layers_of(case.model)):
        return None
    return "it edits patterns, so it needs layers that mix tokens by attention alone"


MECHANISM = Measurement(
    "by which mechanism position is known, and whether it is used",
    "some 100 passes of the model and of its twin",
    mechanism,
    "mechanism",
    Needs(sequences=MECHANISM_SEQUENCES, length=MECHANISM_LENGTH),
    refuses=_not_by_attention_alone,
)
