"""Passkey retrieval over a grid of lengths and depths. Mohtashami & Jaggi 2023; Wang et al. 2024, section 4.3."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import nn

from probe.config import check_size
from probe.errors import ProbeError
from probe.models.anatomy import d_vocab_of
from probe.progress import OnProgress, Steps, untold
from probe.statistics import wilson
from probe.tasks.passkey import DEPTHS, Passkey
from probe.training.evaluation import completions


def passkey(
    model: nn.Module,
    task: Passkey,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    *,
    n: int = 10,
    split: str = "test",
    confidence: float = 0.95,
    seed: int = 0,
    batch_size: int = 16,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """How often a model says the key of prompts of a length that hold it at a depth.

    Prompts are a function of (seed, length, depth): every model gets the same.

    Args:
        task: what prompts are made of: filler, number of keys.
        lengths: tokens in the whole sequence, the key and the special tokens included.
        depths: the share of the filler in front of the key's sentence, in 0…1.
        n: prompts of each length and depth.
        split: whose files the filler is cut from.
        on_progress: called with how many lengths are done, and how many there are.

    Returns:
        Columns length, depth (missing: all depths together), metric, value, low, high (Wilson), n. Metrics:
        "exact_match", the whole key and nothing else is said (where the task has a tokenizer: no other digit, in as
        many tokens as the key has); "digits", the share of digits that are right in their place, whose interval counts
        keys, not digits.

    Raises:
        ProbeError: for a length without room for the question, a depth outside 0…1, or a model of another vocabulary.
    """
    check_size("n", n)
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ProbeError(f"depth must lie in 0…1, got {depth}")
    vocabulary = task.vocabulary
    if not vocabulary.fits(d_vocab_of(model)):
        raise ProbeError(f"a model of {vocabulary.wanted} was wanted, got one of {d_vocab_of(model)}")
    rows, steps = [], Steps(len(lengths), on_progress)
    for length in lengths:
        prompts = [
            task.prompt(length, depth, np.random.default_rng([seed, length, round(1000 * depth), i]), split)
            for depth in depths
            for i in range(n)
        ]
        tokens = completions(model, [p.example for p in prompts], vocabulary, batch_size=batch_size)
        said = [list(task.said(t)) for t in tokens]
        found = pd.DataFrame(
            {
                "depth": [depth for depth in depths for _ in range(n)],
                "exact_match": [s == list(p.key) for s, p in zip(said, prompts, strict=True)],
                "digits": [_right_digits(s, p.key) for s, p in zip(said, prompts, strict=True)],
            }
        )
        for depth, part in [(pd.NA, found), *found.groupby("depth", sort=False)]:
            for metric in ("exact_match", "digits"):
                share = float(part[metric].mean())
                low, high = wilson(round(share * len(part)), len(part), confidence)
                rows.append((length, depth, metric, share, low, high, len(part)))
        steps.step()
    rows = pd.DataFrame(rows, columns=["length", "depth", "metric", "value", "low", "high", "n"])
    return rows.assign(n_keys=task.n_keys).astype({"depth": "Float64"})


def _right_digits(said: Sequence[str], key: str) -> float:
    return sum(a == b for a, b in zip(said, key, strict=False)) / len(key)
