"""Decoders that exist already: the stages of a study without its training."""

import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from probe.files import write_file, write_text
from probe.models.anatomy import untrained_like
from probe.position import probe_over_training
from probe.report.attention_sections import attention_figures, attention_sections
from probe.report.geometry import position_against_loss
from probe.report.page import Section, render_page
from probe.report.position import extrapolation_curve, probe_heatmap
from probe.study.config import TracedSequences
from probe.study.stages import (
    FIGURE_STAGES,
    PROBE_TARGETS,
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
    say: Callable[[str], None] = lambda line: None,
) -> pd.DataFrame:
    """Measure the attention of decoders and of the differences between them; write rows and a report into a folder.

    Every model has an untrained one of its shape as control; the stages are a study's (``attention_stages``,
    ``pair_stages``). Where the patterns are too large to be held, attention is streamed: then there is no census, and
    models are not compared with each other.

    Returns:
        The rows, with the columns measurement and encoding (the model's name).
    """
    folder = Path(folder)
    untrained, start = {}, seed
    for name, decoders in models.items():
        # Equal starts would resemble each other for that reason alone.
        untrained[name] = [untrained_like(decoder, start + r) for r, decoder in enumerate(decoders)]
        start += len(decoders)
    rows, drawings = [], {stage: {} for stage in FIGURE_STAGES}
    for name, decoders in models.items():
        for stage, measure in attention_stages(decoders, untrained[name], traced, seed).items():
            found = measure()
            if stage in drawings:
                drawings[stage][name] = found
            else:
                rows.append(found.assign(measurement=stage, encoding=name))
        say(f"{name}: measured")
    if len(models) > 1 and any(too_long(decoders[0], traced.tokens) for decoders in models.values()):
        say("models not compared with each other: that wants whole patterns, which are too large at this length")
    elif len(models) > 1:
        for stage, measure in pair_stages(models, untrained, traced.tokens, seed).items():
            rows.append(measure().assign(measurement=stage))
        say("models compared")
    collected = pd.concat(rows, ignore_index=True).astype({"layer": "Int64", "head": "Int64"})
    drawn = attention_figures(collected, drawings["maps"], drawings["curves"])
    n, length = traced.tokens.shape
    summary = [
        f"{len(models)} models ({', '.join(models)}) on {n} sequences of {length} tokens. Untrained models of the same "
        "shape are the control."
    ]
    page = render_page("Attention compared", summary, attention_sections(collected, drawn))
    write_file(folder / "rows.parquet", lambda path: collected.to_parquet(path, index=False))
    write_text(folder / "report.html", page)
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
) -> pd.DataFrame:
    """Fit probes of position to decoders, those of one name being its seeds; write rows and a report into a folder.

    With ``fitted_length`` there are probes besides that are fitted to so many tokens and scored on up to four times as
    many. ``over_training`` names runs that kept their checkpoints: the position is then probed at each of these, beside
    the loss. Controls as ``probe_positions`` has them.
    """
    folder, rows = Path(folder), []
    lengths = torch.full((len(traced.tokens),), traced.tokens.shape[1])
    for i, (name, decoders) in enumerate(models.items()):
        untrained = [untrained_like(d, seed + 1000 * i + r) for r, d in enumerate(decoders)]
        found = fitted_probes(decoders, untrained, traced.tokens, sites=sites, targets=targets, seed=seed)
        rows.append(found.assign(measurement="fit", encoding=name))
        if fitted_length is not None:
            found = extrapolation(decoders, untrained, traced.tokens, lengths, fitted_length=fitted_length, seed=seed)
            rows.append(found.assign(measurement="extrapolation", encoding=name))
    for name, run in over_training.items():
        found = probe_over_training(checkpoints_of(run), traced.tokens, scored=traced.scored, seed=seed)
        rows.append(found.assign(measurement="over_training", encoding=name))
    collected = pd.concat(rows, ignore_index=True)
    fit = collected[collected["measurement"] == "fit"]
    in_layers = fit[fit["site"].str.startswith("blocks.")]
    figures = [(f"R² by layer and site: {t}.", probe_heatmap(in_layers, t)) for t in _drawn_targets(in_layers)]
    if fitted_length is not None:
        beyond = collected[collected["measurement"] == "extrapolation"]
        figures.append(("Error by position, fitted left of the line only.", extrapolation_curve(beyond)))
    for name in over_training:
        run = collected[(collected["measurement"] == "over_training") & (collected["encoding"] == name)]
        figures.append((f"R² of the position and loss over the training of {name}.", position_against_loss(run)))
    text = [
        "Ridge regressions on held-out sequences, beside an untrained model, the token embedding, shuffled positions "
        "and a random projection of the token; the colour is the R² less the untrained model's."
    ]
    n, length = traced.tokens.shape
    summary = [f"{len(models)} models ({', '.join(models)}) on {n} sequences of {length} tokens."]
    page = render_page("Position in hidden states", summary, [Section("Probes of position", text, figures=figures)])
    write_file(folder / "rows.parquet", lambda path: collected.to_parquet(path, index=False))
    write_text(folder / "report.html", page)
    return collected


def _drawn_targets(rows: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(rows["target"]))
