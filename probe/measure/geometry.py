"""The geometry of position in hidden states."""

import pandas as pd

from probe.measure.base import Case, Measurement, Needs
from probe.position import decompose_hidden, variance_by_position
from probe.tracing import EMBED, RESID_POST, trace

ATTN_OUT = "hook_attn_out"


def geometry(case: Case) -> pd.DataFrame:
    """The parts of hidden states after every layer, and how the variance of attention outputs falls with position."""
    own, twin = (trace(model, case.tokens, [EMBED, RESID_POST, ATTN_OUT]) for model in (case.model, case.twins[0]))
    streams = [site for site in own.values if not site.endswith(ATTN_OUT)]
    parts = decompose_hidden(own, streams, untrained=twin, seed=case.seed).rows
    return pd.concat([parts, variance_by_position(own, untrained=twin, seed=case.seed)], ignore_index=True)


GEOMETRY = Measurement(
    "which share of hidden states position fixes, and how variance falls with position",
    "one pass of the model and of its twin",
    geometry,
    "geometry",
    Needs(sequences=4),
)
