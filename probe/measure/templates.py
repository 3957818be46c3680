"""Attention beside its templates."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from torch import nn

from probe.attention import LongContext, attention_maps, compare_long_context, compare_templates
from probe.attention.pooling import BINS
from probe.measure.base import Case, Measurement, Needs
from probe.models.anatomy import our_decoder
from probe.models.encodings import T5
from probe.tracing import PATTERN, trace


def own_t5(model: nn.Module) -> dict[str, Any]:
    """The bias that a decoder with T5's encoding has learned, as options of ``compare_templates``; none of others."""
    decoder = our_decoder(model)
    if decoder is None or not isinstance(decoder.encoding, T5):
        return {}
    return {"t5_table": decoder.encoding.weight.detach(), "t5_max_distance": decoder.encoding.max_distance}


def templates(case: Case) -> pd.DataFrame:
    """The distance of every head from every template, of the model and of its twin, beside its nulls. A second training
    is the null of another seed. Long sequences are streamed, with three fitted templates."""
    if case.long:
        return case.beside_twins(lambda control, _: _long(case, control).rows)

    def of_one(control: str, models: Sequence[nn.Module]) -> pd.DataFrame:
        traces = [trace(model, case.tokens, [PATTERN]) for model in models[:2]]
        other = traces[1] if len(traces) > 1 else None
        return compare_templates(traces[0], **own_t5(models[0]), other_seed=other, seed=case.seed)

    return case.beside_twins(of_one)


def maps(case: Case) -> pd.DataFrame:
    """The mean pattern of every head, its best template, and the difference."""
    if case.long:
        return _long(case, "none").maps
    return attention_maps(trace(case.model, case.tokens, [PATTERN]), **own_t5(case.model), bins=BINS)


def _long(case: Case, control: str) -> LongContext:
    model = case.model if control == "none" else case.twins[0]
    return case.once(("long", control), lambda: compare_long_context(model, case.tokens, seed=case.seed))


TEMPLATES = Measurement(
    "the distance of every head from T5, ALiBi and other templates, beside nulls",
    "one pass of the model and of its twin, a fit per head",
    templates,
    "templates",
    Needs(sequences=2),
)
MAPS = Measurement("mean attention maps of every head", "one pass", maps, "templates", Needs(sequences=2), drawn=True)
