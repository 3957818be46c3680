"""Texts up to beyond the trained length: loss by position, perplexity, passkeys."""

import math
from collections.abc import Sequence

import pandas as pd

import probe.extrapolation
from probe.measure.base import Case, Measurement, Needs
from probe.measure.data import check_contexts
from probe.progress import OnProgress, untold
from probe.tasks.passkey import DEPTHS

# No attention temperature, no stretched positions: rows of ``probe scale`` say which variant they are of.
UNCHANGED = {"variant": "none", "extension": math.nan}


def by_position(case: Case, *, contexts: Sequence[int] | None = None) -> pd.DataFrame:
    """The loss of a token by its position: on held-out texts as long as the longest of ``contexts`` where these are
    given, else on the sequences."""
    if contexts is None or case.texts is None:
        return probe.extrapolation.loss_by_position(case.model, case.tokens, seed=case.seed).assign(**UNCHANGED)
    check_contexts(case.texts, contexts)
    texts, prefix = case.texts.held_out_of(max(contexts)), case.texts.task.plain_prefix
    rows = probe.extrapolation.loss_by_position(case.model, texts, prefix=prefix, seed=case.seed)
    return rows.assign(**UNCHANGED)


def by_context(case: Case, *, contexts: Sequence[int] | None = None, on_progress: OnProgress = untold) -> pd.DataFrame:
    """Perplexity by context, of the second half of held-out texts as long as the longest context."""
    assert case.texts is not None  # NEEDS says so
    contexts = tuple(contexts or case.texts.within(case.model).contexts)
    check_contexts(case.texts, contexts)
    texts = case.texts.held_out_of(max(contexts))
    rows = probe.extrapolation.perplexity(
        case.model, texts, contexts, prefix=case.texts.task.plain_prefix, score_from=texts.shape[1] // 2,
        seed=case.seed, on_progress=on_progress,
    )  # fmt: skip
    return rows.assign(**UNCHANGED)


def passkeys(
    case: Case,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """The share of hidden keys that are said, by length of the prompt and depth of the key."""
    assert case.texts is not None  # NEEDS says so
    lengths = tuple(lengths or case.texts.within(case.model).contexts)
    rows = probe.extrapolation.passkey(
        case.model, case.texts.task, lengths, depths, n=case.texts.n_prompts, seed=case.seed, on_progress=on_progress
    )
    return rows.assign(**UNCHANGED)


LOSS_BY_POSITION = Measurement("the loss of a token by its position", "one pass", by_position, "beyond")
PERPLEXITY = Measurement(
    "perplexity by context, up to beyond the trained length",
    "many passes over long texts",
    by_context,
    "beyond",
    Needs(texts=True),
    asked=True,
)
PASSKEY = Measurement(
    "a key hidden in a long text: exact match by length and depth",
    "decodes many long prompts",
    passkeys,
    "passkey",
    Needs(texts=True),
    asked=True,
)
