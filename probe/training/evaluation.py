"""Exact match by length, from greedy decoding."""

from collections.abc import Sequence

import pandas as pd
from scipy.stats import binomtest

from probe.errors import ProbeError
from probe.models.decoder import Decoder
from probe.tasks.base import EOS, Example, Vocabulary
from probe.training.decoding import greedy_in_groups


def predict(
    decoder: Decoder, examples: Sequence[Example], vocabulary: Vocabulary, *, batch_size: int = 256
) -> pd.DataFrame:
    """One row an example: source, target, prediction (strings), length, correct.

    Decoding goes at most one token beyond the target, which is enough to tell a prediction that is right from one
    that goes on.
    """
    if not examples:
        raise ProbeError("at least one example was wanted, got none")
    was_training = decoder.training
    decoder.eval()
    predictions = greedy_in_groups(
        decoder,
        [vocabulary.prompt(e) for e in examples],
        stop=vocabulary.ids[EOS],
        max_new=[len(e.target) + 1 for e in examples],
        batch_size=batch_size,
    )
    decoder.train(was_training)
    return pd.DataFrame(
        {
            "source": [" ".join(e.source) for e in examples],
            "target": [" ".join(e.target) for e in examples],
            "prediction": [" ".join(vocabulary.decode(p)) for p in predictions],
            "length": [e.length for e in examples],
            "correct": [vocabulary.decode(p) == list(e.target) for p, e in zip(predictions, examples, strict=True)],
        }
    )


def exact_match(predictions: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Exact match in [0, 1] by length, and over all lengths (``length`` missing), with Wilson intervals.

    Columns: length, metric, value, low, high, n.
    """
    groups = [(pd.NA, predictions), *predictions.groupby("length")]
    rows = []
    for length, group in groups:
        right, n = int(group["correct"].sum()), len(group)
        interval = binomtest(right, n).proportion_ci(confidence, method="wilson")
        rows.append((length, "exact_match", right / n, interval.low, interval.high, n))
    rows = pd.DataFrame(rows, columns=["length", "metric", "value", "low", "high", "n"])
    return rows.astype({"length": "Int64"})
