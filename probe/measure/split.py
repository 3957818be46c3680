"""Scores split into position and content, and the entropy of attention."""

import pandas as pd

from probe.attention import ScoreSplit, attention_summary, split_long_context, split_scores, stream
from probe.measure.base import Case, Measurement, Needs
from probe.tracing import PATTERN, SCORES, trace


def split(case: Case) -> pd.DataFrame:
    """The share of the scores' variance that distance, key and content explain, of the model and of its twin."""
    return case.beside_twins(lambda control, _: _split(case, control).rows)


def curves(case: Case) -> pd.DataFrame:
    """The curves f_rel, f_abs and g of every head."""
    return case.beside_twins(lambda control, _: _split(case, control).curves)


def entropy(case: Case) -> pd.DataFrame:
    """The entropy of every head by query position; of long sequences it is streamed."""
    if case.long:
        return case.beside_twins(lambda _, of: stream(of[0], case.tokens).rows())
    return case.beside_twins(lambda _, of: attention_summary(trace(of[0], case.tokens, [PATTERN]), seed=case.seed))


def _split(case: Case, control: str) -> ScoreSplit:
    model = case.model if control == "none" else case.twins[0]

    def make() -> ScoreSplit:
        if case.long:
            return split_long_context(model, case.tokens, seed=case.seed)
        return split_scores(trace(model, case.tokens, [SCORES]), seed=case.seed)

    return case.once(("split", control), make)


SPLIT = Measurement(
    "how much of attention scores distance, key and content explain",
    "one pass of the model and of its twin, a least-squares fit per head",
    split,
    "split",
    Needs(sequences=2),
)
CURVES = Measurement(
    "the curves of the split of scores", "nothing beyond the split", curves, "split", Needs(sequences=2), drawn=True
)
ENTROPY = Measurement(
    "the entropy of attention by query position", "one pass of the model and of its twin", entropy, "split"
)
