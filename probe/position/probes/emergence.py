"""When position appears: a probe on the checkpoints of one training run, beside the loss."""

from collections.abc import Callable, Iterable

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from probe.errors import ProbeError
from probe.losses import sequence_losses
from probe.position.probes.linear import fit_position_probe
from probe.position.probes.scores import Draws
from probe.sequences import Sequences, TokenIds, first_of_each, marked
from probe.statistics import N_BOOTSTRAP
from probe.tracing import RESID_POST, logits_with_edits

COLUMNS = ["step", "site", "metric", "value", "low", "high", "n"]
Measure = Callable[[nn.Module, Int[Tensor, "batch pos"]], pd.DataFrame]


def ridge_r2(model: nn.Module, tokens: TokenIds) -> pd.DataFrame:
    """R² of a ridge regression of the position at every ``hook_resid_post``, split by sequence."""
    rows = fit_position_probe(model, tokens, [RESID_POST], probes=["ridge"], controls=())
    return rows[rows["metric"] == "r2"].rename(columns={"n_test": "n"})


def probe_over_training(
    checkpoints: Iterable[tuple[int, nn.Module]],
    tokens: TokenIds,
    *,
    measure: Measure = ridge_r2,
    scored: Bool[Tensor, "batch scored_pos"] | None = None,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """What a probe finds, and the loss, at each of the checkpoints of one run.

    Step 0, the model before training, is the control of all others: some of position is there from the start.

    Args:
        checkpoints: the step and the model as it was after it; models are asked for one at a time, so a generator that
            loads them holds one: ``probe.training.checkpoints_of``.
        tokens: sequences of one length, none padded, the same at every step.
        measure: rows of a model on these tokens, with site, metric, value, low, high and n.
        scored: which tokens' predictions count in the loss (a task's completions); all but the first by default.

    Returns:
        Columns step, site, metric, value, low, high, n, sorted by step: those of ``measure``, and, without a site,
        "loss": next-token cross entropy in nats a scored token, bootstrap intervals over sequences.

    Raises:
        ProbeError: for no checkpoint, a step that occurs twice, ``scored`` of another shape, or none scored.
    """
    ids = Sequences.of(tokens).tokens
    counted = marked("scored", scored, ids)
    kept = first_of_each(ids, None, counted)
    ids, counted = ids[kept], counted[kept]
    if not counted[:, 1:].any():
        raise ProbeError("at least one token after the first must be scored, got none")
    draws = Draws.of(len(ids), n_bootstrap, confidence, seed)
    parts: dict[int, pd.DataFrame] = {}
    for step, model in checkpoints:
        if step in parts:
            raise ProbeError(f"checkpoints must be of different steps, got step {step} twice")
        loss = _losses(model, ids, counted, batch_size)
        n_counted = draws.sequences @ counted[:, 1:].sum(1).double()
        value, low, high = draws.interval((draws.sequences @ loss / n_counted)[:, None])
        row = {"site": "", "metric": "loss", "value": value, "low": low, "high": high, "n": len(ids)}
        found = pd.concat([measure(model, ids), pd.DataFrame(row)], ignore_index=True)
        parts[step] = found.assign(step=step)[COLUMNS]
    if not parts:
        raise ProbeError("probing a run wants at least one checkpoint, got none")
    return pd.concat([parts[step] for step in sorted(parts)], ignore_index=True)


def _losses(model: nn.Module, tokens: Tensor, scored: Tensor, batch_size: int) -> Tensor:
    """The cross entropy of each sequence's scored tokens, summed, in nats."""
    found = []
    for batch, counted in zip(tokens.split(batch_size), scored.split(batch_size), strict=True):
        found.append(sequence_losses(logits_with_edits(model, batch), batch, counted))
    return torch.cat(found)
