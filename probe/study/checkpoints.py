"""Decoders that exist already: the stages of a study without its training."""

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from probe.config import check_size
from probe.models.twins import untrained_twin
from probe.position import probe_over_training
from probe.progress import OnProgress, Steps, untold
from probe.report.attention_sections import attention_figures, attention_sections, attention_summary
from probe.report.geometry import plot_position_against_loss
from probe.report.page import Line, Section, render_page
from probe.report.position import plot_extrapolation_curve, plot_probe_heatmap
from probe.report.position_sections import fit_summary, fit_tables
from probe.runs import at_work
from probe.study.command import made_with, write_page
from probe.study.config import TracedSequences
from probe.study.stages import (
    FIGURE_STAGES,
    PROBE_TARGETS,
    Measure,
    attention_stages,
    extrapolation,
    fitted_probes,
    pair_stages,
    too_long,
)
from probe.training import checkpoints_of


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

    Every model has an untrained one of its shape as control; the stages are a study's (``attention_stages``,
    ``pair_stages``). Where the patterns are too large to be held, attention is streamed: then there is no census, and
    models are not compared with each other. ``on_progress`` is called with how many stages are done, and how many there
    are; ``command``, what was typed, is told on the page.

    Returns:
        The rows, with the columns measurement and encoding (the model's name).

    Raises:
        ProbeError: where the folder is another command's, or another process is at work there.
    """
    folder = Path(folder)
    untrained = {name: [untrained_twin(model, seed) for model in of] for name, of in models.items()}

    def stages_of(name: str) -> dict[str, Measure]:
        return attention_stages(models[name], untrained[name], traced, seed)

    long = any(too_long(decoders[0], traced.tokens) for decoders in models.values())
    pairs = {} if long or len(models) < 2 else pair_stages(models, untrained, traced.tokens, seed)
    # Counted anew and not kept: what stages have in common is held as long as they are.
    steps = Steps(sum(len(stages_of(name)) for name in models) + len(pairs), on_progress)
    with at_work(folder, "compare"):
        rows: list[pd.DataFrame] = []
        drawings: dict[str, dict[str, pd.DataFrame]] = {stage: {} for stage in FIGURE_STAGES}
        for name in models:
            for stage, measure in stages_of(name).items():
                found = measure()
                if stage in drawings:
                    drawings[stage][name] = found
                else:
                    rows.append(found.assign(measurement=stage, encoding=name))
                steps.step()
            say(f"{name}: measured")
        for stage, measure in pairs.items():
            rows.append(measure().assign(measurement=stage))
            steps.step()
        if pairs:
            say("models compared")
        elif len(models) > 1:
            say("models not compared with each other: that wants whole patterns, which are too large at this length")
        collected = pd.concat(rows, ignore_index=True).astype({"layer": "Int64", "head": "Int64"})
        collected = collected.assign(data=traced.data)
        drawn = attention_figures(collected, drawings["maps"], drawings["curves"])
        n, length = traced.tokens.shape
        summary = [
            Line("Compared", f"{len(models)} models ({', '.join(models)}) on {n} sequences of {length} tokens "
                 f"({traced.data}). Untrained models of the same shape are the control."),
            *attention_summary(collected, list(models)),
        ]  # fmt: skip
        made = made_with(next(iter(models.values()))[0], command)
        page = render_page(
            "Attention compared", summary, attention_sections(collected, drawn), rows=collected, made=made
        )
        write_page(folder, "compare", collected, page, made)
        return collected


def fit_checkpoints(
    models: Mapping[str, Sequence[nn.Module]],
    traced: TracedSequences,
    folder: str | Path,
    *,
    sites: Sequence[str] | None = None,
    targets: Sequence[str] = PROBE_TARGETS,
    fitted_length: int | None = None,
    over_training: Mapping[str, Path] = types.MappingProxyType({}),
    seed: int = 0,
    command: str | None = None,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Fit probes of position to decoders, those of one name being its seeds; write rows and a report into a folder.

    With ``fitted_length`` there are probes besides that are fitted to so many tokens and scored on up to four times as
    many. ``over_training`` names runs that kept their checkpoints: the position is then probed at each of these, beside
    the loss. Controls as ``probe_positions`` has them. ``on_progress`` is called with how many fits of a model, and
    runs, are done, and how many there are; ``command``, what was typed, is told on the page.

    Raises:
        ProbeError: where the folder is another command's, or another process is at work there.
    """
    folder, rows = Path(folder), []
    if fitted_length is not None:
        check_size("fitted_length", fitted_length)
    lengths = torch.full((len(traced.tokens),), traced.tokens.shape[1])
    steps = Steps(len(models) * (1 if fitted_length is None else 2) + len(over_training), on_progress)
    with at_work(folder, "fit"):
        for name, decoders in models.items():
            untrained = [untrained_twin(decoder, seed) for decoder in decoders]
            options: dict[str, Any] = {"seed": seed, "on_progress": steps.within}
            found = fitted_probes(decoders, untrained, traced.tokens, sites=sites, targets=targets, **options)
            rows.append(found.assign(measurement="fit", encoding=name))
            steps.step()
            if fitted_length is not None:
                found = extrapolation(
                    decoders, untrained, traced.tokens, lengths, fitted_length=fitted_length, **options
                )
                rows.append(found.assign(measurement="extrapolation", encoding=name))
                steps.step()
        for name, run in over_training.items():
            kept = _told(checkpoints_of(run), len(list((run / "checkpoints").glob("step-*"))) + 1, steps.within)
            found = probe_over_training(kept, traced.tokens, scored=traced.scored, seed=seed)
            rows.append(found.assign(measurement="over_training", encoding=name))
            steps.step()
        collected = pd.concat(rows, ignore_index=True).assign(data=traced.data)
        fit = collected[collected["measurement"] == "fit"]
        in_layers = fit[fit["site"].str.startswith("blocks.")]
        figures = [(f"R² by layer and site: {t}.", plot_probe_heatmap(in_layers, t)) for t in _drawn_targets(in_layers)]
        if fitted_length is not None:
            beyond = collected[collected["measurement"] == "extrapolation"]
            figures.append(("Error by position, fitted left of the line only.", plot_extrapolation_curve(beyond)))
        for name in over_training:
            run = collected[(collected["measurement"] == "over_training") & (collected["encoding"] == name)]
            figures.append(
                (f"R² of the position and loss over the training of {name}.", plot_position_against_loss(run))
            )
        text = [
            "Ridge regressions on held-out sequences, beside an untrained model, the token embedding, shuffled "
            "positions and a random projection of the token; the colour is the R² less the untrained model's."
        ]
        n, length = traced.tokens.shape
        summary = [
            Line("Probed", f"{len(models)} models ({', '.join(models)}) on {n} sequences of {length} tokens "
                 f"({traced.data})."),
            *fit_summary(collected),
        ]  # fmt: skip
        sections = [Section("Probes of position", text, figures=figures, tables=fit_tables(fit))]
        made = made_with(next(iter(models.values()))[0], command)
        page = render_page("Position in hidden states", summary, sections, rows=collected, made=made)
        write_page(folder, "fit", collected, page, made)
        return collected


def _told(
    checkpoints: Iterator[tuple[int, nn.Module]], total: int, on_progress: OnProgress
) -> Iterator[tuple[int, nn.Module]]:
    steps = Steps(total, on_progress)
    for each in checkpoints:
        yield each
        steps.step()


def _drawn_targets(rows: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(rows["target"]))
