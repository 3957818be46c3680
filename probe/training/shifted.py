"""Positions shifted: what a model makes of the same sequences k places further on. Sinha et al. 2022."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from probe.config import check_size
from probe.errors import ProbeError
from probe.models.decoder import Decoder
from probe.models.kinds import OwnModel
from probe.models.mode import evaluating
from probe.sequences import TokenIds, token_ids
from probe.statistics import N_BOOTSTRAP
from probe.training.data import EncodedExamples
from probe.training.forced import beside_baseline, forced_scores

SHIFTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


@torch.no_grad()
def shifted_positions(
    model: OwnModel,
    examples: EncodedExamples,
    shifts: Sequence[int] = SHIFTS,
    *,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
    batch_size: int = 256,
) -> pd.DataFrame:
    """Loss and accuracy on completions when every position p is p + k, by k.

    What depends on no position (NoPE), or on distances alone (T5, ALiBi, rotary), is the same for every k, to rounding;
    what depends on the position itself (learned, sinusoidal) is not.

    Metrics: "loss" (nats a scored token), "token_accuracy", "exact_match" (the share of examples whose every scored
    token is the likeliest, given the right ones before: those that greedy decoding gets right), each in a row more as
    its change from k = 0, "loss_change" and so on, paired.

    Args:
        shifts: k >= 0, in tokens; 0 is always among those that are run. A learned table must have the positions.

    Returns:
        Columns shift, metric, value, low, high, n (distinct examples): bootstrap intervals over examples.

    Raises:
        ProbeError: for no example, a shift below 0, or one that leads beyond a learned table.
    """
    for shift in shifts:
        check_size("shifts", shift, least=0)
    if not len(examples):
        raise ProbeError("at least one example is needed, got none")
    if not isinstance(model, OwnModel):
        raise ProbeError(
            f"model must be a Decoder or a ClockworkRNN, got {type(model).__name__}: no other takes positions"
        )
    examples = examples.distinct()
    with evaluating(model):
        found: dict[float, dict[str, Tensor]] = {
            shift: _measure(model, examples, shift, batch_size) for shift in dict.fromkeys((0, *shifts))
        }
    return beside_baseline("shift", found, shifts, 0, n_bootstrap=n_bootstrap, confidence=confidence, seed=seed)


def shifted_texts(
    model: OwnModel, texts: TokenIds, shifts: Sequence[int] | None = None, **options: Any
) -> pd.DataFrame:
    """``shifted_positions`` of plain texts, of which every token but the first is predicted.

    Args:
        shifts: by default those of ``SHIFTS``, 256 and 512 that a learned table reaches.
        options: as of ``shifted_positions``.
    """
    ids = token_ids(texts, "texts").cpu()
    n, length = ids.shape
    if length < 2:
        raise ProbeError(f"texts must have at least 2 tokens, got {length}")
    if shifts is None:
        last = model.encoding.last_position if isinstance(model, Decoder) else None
        shifts = [k for k in (*SHIFTS, 256, 512) if last is None or k + length - 1 <= last]
    examples = EncodedExamples(ids, torch.ones(n, dtype=torch.long), torch.full((n,), length))
    return shifted_positions(model, examples, shifts, **options)


def _measure(model: OwnModel, examples: EncodedExamples, shift: int, batch_size: int) -> dict[str, torch.Tensor]:
    def logits_of(inputs: torch.Tensor) -> torch.Tensor:
        return model(inputs.to(model.device), positions=model.own_positions(inputs.shape[1]) + shift)

    return forced_scores(logits_of, examples, batch_size=batch_size)
