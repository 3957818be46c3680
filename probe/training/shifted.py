"""Positions shifted: what a model makes of the same sequences k places further on. Sinha et al. 2022."""

from collections.abc import Sequence

import pandas as pd
import torch
from torch.nn.functional import cross_entropy

from probe.bootstrap import Bootstrap
from probe.config import check_size
from probe.errors import ProbeError
from probe.models.build import Model
from probe.training.data import EncodedExamples

SHIFTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


@torch.no_grad()
def shifted_positions(
    model: Model,
    examples: EncodedExamples,
    shifts: Sequence[int] = SHIFTS,
    *,
    n_bootstrap: int = 1000,
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
        Columns shift, metric, value, low, high, n (examples): percentile intervals over examples.

    Raises:
        ProbeError: for no example, a shift below 0, or one that leads beyond a learned table.
    """
    for shift in shifts:
        check_size("shifts", shift, least=0)
    if not len(examples):
        raise ProbeError("at least one example was wanted, got none")
    bootstrap = Bootstrap.draw(len(examples), n_bootstrap, confidence, seed)
    weights = bootstrap.value_and_draws
    was_training = model.training
    model.eval()
    found = {shift: _measure(model, examples, shift, batch_size) for shift in dict.fromkeys((0, *shifts))}
    model.train(was_training)
    scored = weights @ found[0]["scored"]

    def stack(shift: int, metric: str) -> torch.Tensor:
        of = weights @ found[shift][metric]
        return of if metric == "exact_match" else of / scored

    rows = []
    for shift in shifts:
        for metric in ("loss", "token_accuracy", "exact_match"):
            for name, draws in (
                (metric, stack(shift, metric)),
                (f"{metric}_change", stack(shift, metric) - stack(0, metric)),
            ):
                low, high = bootstrap.interval(draws[1:])
                rows.append((shift, name, float(draws[0]), float(low), float(high), len(examples)))
    return pd.DataFrame(rows, columns=["shift", "metric", "value", "low", "high", "n"])


def _measure(model: Model, examples: EncodedExamples, shift: int, batch_size: int) -> dict[str, torch.Tensor]:
    """By example: summed loss, right tokens, whether all are right, scored tokens."""
    parts = []
    for rows in torch.arange(len(examples)).split(batch_size):
        batch = examples.batch(rows)
        positions = model.own_positions(batch.inputs.shape[1]) + shift
        logits = model(batch.inputs.to(model.device), positions=positions).float().cpu()
        loss = cross_entropy(logits.transpose(1, 2).double(), batch.targets, reduction="none")
        right = (logits.argmax(-1) == batch.targets) & batch.scored
        parts.append(
            torch.stack(
                [
                    loss.where(batch.scored, 0.0).sum(1),
                    right.sum(1).double(),
                    (right == batch.scored).all(1).double(),
                    batch.scored.sum(1).double(),
                ]
            )
        )
    return dict(zip(("loss", "token_accuracy", "exact_match", "scored"), torch.cat(parts, dim=1), strict=True))
