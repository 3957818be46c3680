"""Decoders that exist already: what a study measures, without its training."""

import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from probe.config import check_size
from probe.errors import unknown_name
from probe.measure.base import Case
from probe.measure.data import TracedSequences
from probe.measure.probes import FITTED_TARGETS
from probe.measure.registry import MEASUREMENTS
from probe.measure.run import measure_models
from probe.measure.templates import own_t5
from probe.models.anatomy import sites_of
from probe.position import TARGETS
from probe.progress import OnProgress, untold
from probe.study.places import check_file_names
from probe.training import checkpoints_of

ATTENTION = ("templates", "census", "split", "curves", "entropy", "maps", "model_distance", "model_order", "trained_t5")


def compare_checkpoints(
    models: Mapping[str, Sequence[nn.Module]],
    traced: TracedSequences,
    folder: str | Path,
    *,
    seed: int = 0,
    command: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Measure the attention of decoders and of the differences between them; write rows and a report into a folder.

    Every model has an untrained twin as control. Where the patterns are too large to be held, attention is streamed:
    then there is no census, and models are not compared with each other.

    Args:
        models: by name, the trainings of each.
        traced: the sequences on which the models are looked at.
        folder: where rows and report go.
        seed: of whatever is drawn.
        command: what was typed; the page tells it.
        say: called with a line when a measurement is finished.
        on_progress: called with how many measurements are done, and how many there are.

    Returns:
        The rows, with the columns measurement, model and encoding.

    Raises:
        ProbeError: where the folder is another command's or holds other work, or another process works there.
    """
    cases = cases_of(models, traced, seed)
    with_table = any(own_t5(case.model) for case in cases)
    names = [n for n in ATTENTION if MEASUREMENTS[n].needs.models <= len(cases) and (with_table or n != "trained_t5")]
    return measure_models(
        cases, folder, names, command="compare", title="Attention compared", typed=command,
         say=say, on_progress=on_progress,
    )  # fmt: skip


def fit_checkpoints(
    models: Mapping[str, Sequence[nn.Module]],
    traced: TracedSequences,
    folder: str | Path,
    *,
    sites: Sequence[str] | None = None,
    targets: Sequence[str] = FITTED_TARGETS,
    fitted_length: int | None = None,
    over_training: Mapping[str, Path] = types.MappingProxyType({}),
    seed: int = 0,
    command: str | None = None,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Fit probes of position to decoders; write rows and a report into a folder.

    Args:
        models: by name, the trainings of each.
        traced: the sequences on which the models are looked at.
        folder: where rows and report go.
        sites: TransformerLens's names; all by default.
        targets: what is read from hidden states, names of ``probe.position.TARGETS``.
        fitted_length: further probes are fitted to so many tokens and scored on up to four times as many.
        over_training: by name, the folders of trainings that kept their checkpoints. Position is then probed at each of
            these, beside the loss.
        seed: of whatever is drawn.
        command: what was typed; the page tells it.
        on_progress: called with how many measurements are done, and how many there are.

    Returns:
        The rows, with the columns measurement, model and encoding.

    Raises:
        ProbeError: where the folder is another command's or holds other work, or another process works there.
    """
    for target in targets:
        if target not in TARGETS:
            raise unknown_name("target", target, TARGETS)
    for of in models.values():
        for site in sites or ():
            if site not in sites_of(of[0]):
                raise unknown_name("site", site, sites_of(of[0]))
    names, options = ["fit"], {"fit": _said(sites=sites, targets=list(targets))}
    if fitted_length is not None:
        check_size("fitted_length", fitted_length)
        names.append("extrapolation")
        options["extrapolation"] = {"fitted_length": fitted_length}
    for run in over_training.values():
        next(checkpoints_of(run))  # refuses a run that kept none
    if over_training:
        names.append("over_training")
    cases = cases_of(models, traced, seed, runs=over_training)
    return measure_models(
        cases, folder, names, options=options, command="fit", title="Position in hidden states", typed=command,
         on_progress=on_progress,
    )  # fmt: skip


def cases_of(
    models: Mapping[str, Sequence[nn.Module]],
    traced: TracedSequences,
    seed: int,
    *,
    runs: Mapping[str, Path] = types.MappingProxyType({}),
) -> list[Case]:
    """The cases of models that are measured on the same sequences. Their names become those of files."""
    check_file_names(models)
    return [Case(name, of, traced, seed, run=runs.get(name)) for name, of in models.items()]


def _said(**options: Any) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items() if value}
