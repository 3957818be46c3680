"""The census of heads."""

import pandas as pd

import probe.attention
from probe.measure.base import Case, Measurement, Needs
from probe.models.anatomy import n_heads_of, n_layers_of
from probe.models.open.recorded import Recorded
from probe.models.open.ways import as_model

ABLATED = 64  # heads: of a larger model on a CPU, three forward passes for each take long, and are left out


def heads(case: Case, *, ablate: bool | None = True, head_detector: bool = False) -> pd.DataFrame:
    """The label of every head of the model and of its twin, and what the model's heads are used for.

    Args:
        case: the model.
        ablate: replace the pattern of every head, three passes a head; None: where that takes no longer than minutes.
        head_detector: TransformerLens's scores besides.
    """
    if ablate is None:
        few = n_layers_of(case.model) * n_heads_of(case.model) <= ABLATED
        on_gpu = as_model(case.model).device.type != "cpu"
        ablate = not isinstance(case.model, Recorded) and (few or on_gpu)
    return case.beside_twins(
        lambda control, of: probe.attention.census(
            of[0], case.tokens, scored=case.scored, ablate=ablate and control == "none", seed=case.seed,
            head_detector=head_detector and control == "none",
        )
    )  # fmt: skip


CENSUS = Measurement(
    "what every head looks like, and what it is used for",
    "three passes per head",
    heads,
    "census",
    Needs(sequences=2, length=3, scored=True, patterns=True),
)
