"""Whether position is used."""

import pandas as pd

from probe.attention import distance_from_template
from probe.measure.base import Case, Measurement, Needs
from probe.position import erase_position

RESID_PRE = "hook_resid_pre"


def use(case: Case, *, patterns: bool = False) -> pd.DataFrame:
    """What erasing position before each layer costs, beside random subspaces. With ``patterns``, also how far all later
    patterns then are from their templates, which takes as long as all the rest."""
    distance = distance_from_template if patterns else None
    return erase_position(case.model, case.tokens, [RESID_PRE], scored=case.scored, distance=distance, seed=case.seed)


USE = Measurement(
    "what erasing position before each layer costs, beside random subspaces",
    "some 20 passes per layer",
    use,
    "use",
    Needs(sequences=4, length=3, scored=True),
)
