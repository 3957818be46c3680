"""What a model loses when all positions are shifted."""

import pandas as pd

from probe.measure.base import Case, Measurement, Needs
from probe.models.kinds import OwnModel
from probe.training import encode
from probe.training.shifted import SHIFTS, shifted_positions, shifted_texts


def shifted(case: Case, *, most: int = 500) -> pd.DataFrame:
    """Loss and accuracy when every position p is taken for p + k, as far as the model knows positions: on examples of
    trained lengths where there are any, else on the sequences."""
    assert isinstance(case.model, OwnModel)  # NEEDS says so
    if case.examples is None:
        return shifted_texts(case.model, case.tokens, seed=case.seed)
    examples = encode(case.examples.splits.validation[:most], case.examples.task.vocabulary)
    last, length = case.last_position, examples.tokens.shape[1]
    shifts = [k for k in SHIFTS if last is None or k + length - 1 <= last]
    return shifted_positions(case.model, examples, shifts, seed=case.seed)


SHIFTED = Measurement(
    "loss and accuracy when all positions are shifted",
    "some forward passes per shift",
    shifted,
    "shifted",
    Needs(ours=True),
)
