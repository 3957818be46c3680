"""Linear probes of position, beside their controls."""

from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from torch import nn

from probe.config import check_size
from probe.measure.base import Case, Measurement, Needs
from probe.models.anatomy import n_layers_of
from probe.position import fit_position_probe, probe_over_training, probe_positions
from probe.progress import OnProgress, Steps, untold
from probe.tracing import RESID_POST, block_site
from probe.training import checkpoints_of

FITTED_TARGETS = ("position", "log_position", "inverse_position")


def probe(case: Case) -> pd.DataFrame:
    """Ridge and logistic probes of position after every layer."""
    return fit_position_probe(case.model, case.tokens, untrained=case.twins[0], seed=case.seed)


def fit(
    case: Case,
    *,
    sites: Sequence[str] | None = None,
    targets: Sequence[str] = FITTED_TARGETS,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Ridge probes of several targets at every site, over all trainings of a model."""
    return probe_positions(
        list(case.models), case.tokens, sites, targets=targets, untrained=case.twins, seed=case.seed,
        on_progress=on_progress,
    )  # fmt: skip


def extrapolation(case: Case, *, fitted_length: int | None = None, on_progress: OnProgress = untold) -> pd.DataFrame:
    """Probes after the last layer, fitted to the first part of the sequences (a quarter of the longest by default) and
    scored by position beyond it; on whole examples of a task where there are any."""
    if fitted_length is not None:
        check_size("fitted_length", fitted_length)
    tokens, lengths = case.tokens, torch.full((len(case.tokens),), case.tokens.shape[1])
    if case.examples is not None:
        tokens, lengths = case.examples.held_out_sequences(case.seed)
    last = block_site(n_layers_of(case.model) - 1, RESID_POST)
    return probe_positions(
        list(case.models), tokens, [last], lengths=lengths, fitted_length=fitted_length or max(2, tokens.shape[1] // 4),
        untrained=case.twins, seed=case.seed, on_progress=on_progress,
    )  # fmt: skip


def over_training(case: Case, *, on_progress: OnProgress = untold) -> pd.DataFrame:
    """The R² of position after the last layer, and the loss, at each checkpoint that the training kept."""
    assert case.run is not None  # NEEDS says so
    kept = len(list((case.run / "checkpoints").glob("step-*"))) + 1
    checkpoints = _counted(checkpoints_of(case.run), Steps(kept, on_progress))
    return probe_over_training(checkpoints, case.tokens, scored=case.scored, seed=case.seed)


def _counted(checkpoints: Iterator[tuple[int, nn.Module]], steps: Steps) -> Iterator[tuple[int, nn.Module]]:
    for each in checkpoints:
        yield each
        steps.step()


PROBE = Measurement(
    "ridge and logistic probes of position after every layer, beside controls",
    "one pass per control, a fit per layer",
    probe,
    "probes",
    Needs(sequences=4),
)
FIT = Measurement(
    "ridge probes of position, its logarithm and its inverse at every site, beside controls",
    "one pass per control, a fit per site",
    fit,
    "probes",
    Needs(sequences=4),
)
EXTRAPOLATION = Measurement(
    "probes fitted to short sequences and scored beyond them",
    "one pass per control, one fit",
    extrapolation,
    "probes",
    Needs(sequences=4, length=4),
)
OVER_TRAINING = Measurement(
    "probes and loss at every checkpoint that a training kept",
    "one pass and one fit per checkpoint",
    over_training,
    "probes",
    Needs(sequences=4, run=True),
)
