"""What a study measures: a function a stage, from models and tokens to rows. A finished stage is a file."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from probe.attention import (
    LongContext,
    ScoreSplit,
    attention_maps,
    attention_summary,
    census,
    compare_long_context,
    compare_models,
    compare_templates,
    compare_to,
    distance_from_template,
    split_long_context,
    split_scores,
    stream,
)
from probe.attention.pooling import BINS
from probe.digests import check_digests, read_finished_rows, write_finished_rows
from probe.errors import ProbeError
from probe.extrapolation import can_scale, sweep_scale
from probe.models.anatomy import n_heads_of, n_layers_of, our_decoder
from probe.models.decoder import Decoder
from probe.models.encodings import T5
from probe.models.kinds import Model
from probe.position import (
    MECHANISM_LENGTH,
    MECHANISM_SEQUENCES,
    decompose_hidden,
    erase_position,
    fit_position_probe,
    name_mechanism,
    probe_positions,
    variance_by_position,
)
from probe.position.edits.erasing import FitDistance
from probe.progress import OnProgress, untold
from probe.sequences import first_of_each
from probe.study.config import StudyData, TracedSequences
from probe.tracing import EMBED, PATTERN, RESID_POST, SCORES, Trace, block_site, trace
from probe.training import encode, exact_match, predict
from probe.training.shifted import SHIFTS, shifted_positions

# What is measured of each model, and what of it goes among the study's rows.
ROW_STAGES = (
    *("accuracy", "shifted", "probe", "fit", "extrapolation", "use", "geometry", "mechanism"),
    *("templates", "census", "split", "entropy", "temperature"),
)
FIGURE_STAGES = ("maps", "curves")  # what is drawn and not among the rows
RESID_PRE, ATTN_OUT = "hook_resid_pre", "hook_attn_out"
PROBE_TARGETS = ("position", "log_position", "inverse_position")
PAIR_STAGES = ("model_distance", "model_order", "trained_t5")

# Attention is streamed where sequences are longer, or all patterns of a model hold more numbers (1 GiB in float32).
DENSE_LENGTH = 1024
DENSE = 2**28


def stage_file(folder: str | Path, name: str) -> Path:
    """Where the rows of a stage are, once it is finished."""
    return Path(folder) / "rows" / f"{name}.parquet"


def write_stage(folder: Path, name: str, measure: Callable[[], pd.DataFrame]) -> bool:
    """Measure and keep the rows, unless they are finished; return whether there was anything to do.

    Rows without a digest are not taken for finished ones: nobody knows what measured them.

    Raises:
        ProbeError: where the finished rows are not those that were written.
    """
    path = stage_file(folder, name)
    if path.exists() and check_digests(path):
        return False
    write_finished_rows(path, measure())
    return True


def read_stage(folder: str | Path, name: str) -> pd.DataFrame:
    """The rows of a finished stage."""
    path = stage_file(folder, name)
    if not path.exists():
        raise ProbeError(f"{path}: no such file; the study has not come to that stage")
    return read_finished_rows(path)


Measure = Callable[[], pd.DataFrame]


def model_stages(
    decoders: Sequence[nn.Module], untrained: Sequence[nn.Module], data: StudyData, traced: TracedSequences, seed: int
) -> dict[str, Measure]:
    """The stages of one encoding, whose first model is measured; the others are its further seeds."""
    first = decoders[0]
    stages = {
        "accuracy": lambda: pd.concat(
            [accuracy(decoder, data).assign(seed=seed + r) for r, decoder in enumerate(decoders)], ignore_index=True
        ),
        **hidden_stages(decoders, untrained, traced, seed),
        "extrapolation": lambda: extrapolation(decoders, untrained, *data.held_out_sequences(seed), seed=seed),
        **attention_stages(decoders, untrained, traced, seed),
    }
    if isinstance(first, Model):  # a bridge takes no positions
        stages["shifted"] = lambda: shifted(first, data, seed=seed)
    if can_scale(first):
        stages["temperature"] = lambda: temperature(first, data, seed=seed)
    return stages


def hidden_stages(
    models: Sequence[nn.Module],
    untrained: Sequence[nn.Module],
    traced: TracedSequences,
    seed: int,
    *,
    distance: FitDistance | None = distance_from_template,
) -> dict[str, Measure]:
    """The stages that look at hidden states: what can be read of position, whether it is used, its geometry, and by
    which mechanism it came; each beside the untrained model. The first model is measured, of others only probes. Where
    position is erased, the ``distance`` of all later patterns from their templates is looked at, too, if there is one:
    it takes as long as all the rest. The mechanism is left out where sequences are too short for it, or too few."""
    first, control, tokens = models[0], untrained[0], traced.tokens
    stages = {
        "probe": lambda: fit_position_probe(first, tokens, seed=seed),
        "fit": lambda: fitted_probes(models, untrained, tokens, seed=seed),
        "use": lambda: erase_position(first, tokens, [RESID_PRE], scored=traced.scored, distance=distance, seed=seed),
        "geometry": lambda: geometry(first, control, tokens, seed=seed),
    }
    n_distinct = len(first_of_each(tokens, None, traced.scored))
    if tokens.shape[1] >= MECHANISM_LENGTH and n_distinct >= MECHANISM_SEQUENCES:
        stages["mechanism"] = lambda: pd.concat(
            [
                name_mechanism(model, tokens, scored=traced.scored, seed=seed).assign(control=of)
                for of, model in (("none", first), ("untrained", control))
            ],
            ignore_index=True,
        )
    return stages


def attention_stages(
    decoders: Sequence[nn.Module],
    untrained: Sequence[nn.Module],
    traced: TracedSequences,
    seed: int,
    *,
    ablate: bool = True,
) -> dict[str, Measure]:
    """The stages that look at attention, each beside the untrained model; further seeds are for the templates' null.
    ``ablate`` says whether the census replaces every head's pattern, three forward passes a head."""
    if too_long(decoders[0], traced.tokens):
        return _long_stages(decoders[0], untrained[0], traced.tokens, seed)
    models = {"none": decoders, "untrained": untrained}
    tokens, scored = traced.tokens, traced.scored

    def of_both(measure: Callable[[str, Sequence[nn.Module]], pd.DataFrame]) -> pd.DataFrame:
        return pd.concat([measure(c, of).assign(control=c) for c, of in models.items() if of], ignore_index=True)

    def templates(control: str, of: Sequence[nn.Module]) -> pd.DataFrame:
        traces = [trace(model, tokens, [PATTERN]) for model in of[:2]]
        other = traces[1] if len(traces) > 1 else None
        rows = compare_templates(traces[0], **own_t5(of[0]), other_seed=other, seed=seed)
        return rows.rename(columns={"distance": "metric"})

    @functools.cache
    def split(control: str) -> ScoreSplit:
        return split_scores(trace(models[control][0], tokens, [SCORES]), seed=seed)

    def heads(control: str, of: Sequence[nn.Module]) -> pd.DataFrame:
        return census(of[0], tokens, scored=scored, ablate=ablate and control == "none", seed=seed)

    return {
        "templates": lambda: of_both(templates),
        "census": lambda: of_both(heads),
        "split": lambda: of_both(lambda control, _: split(control).rows),
        "curves": lambda: of_both(lambda control, _: split(control).curves),
        "entropy": lambda: of_both(lambda _, of: attention_summary(trace(of[0], tokens, [PATTERN]), seed=seed)),
        "maps": lambda: attention_maps(trace(decoders[0], tokens, [PATTERN]), **own_t5(decoders[0]), bins=BINS),
    }


def too_long(model: nn.Module, tokens: torch.Tensor) -> bool:
    """Whether a model's patterns on these sequences are too large for what wants them whole."""
    n, length = tokens.shape
    return length > DENSE_LENGTH or n * n_layers_of(model) * n_heads_of(model) * length**2 > DENSE


def _long_stages(decoder: nn.Module, untrained: nn.Module, tokens: torch.Tensor, seed: int) -> dict[str, Measure]:
    """What can be known of attention without whole patterns: no census, and three fitted templates."""
    models = {"none": decoder, "untrained": untrained}

    def of_both(measure: Callable[[str], pd.DataFrame]) -> pd.DataFrame:
        return pd.concat([measure(control).assign(control=control) for control in models], ignore_index=True)

    @functools.cache
    def templates(control: str) -> LongContext:
        return compare_long_context(models[control], tokens, seed=seed)

    @functools.cache
    def split(control: str) -> ScoreSplit:
        return split_long_context(models[control], tokens, seed=seed)

    return {
        "templates": lambda: of_both(lambda c: templates(c).rows).rename(columns={"distance": "metric"}),
        "split": lambda: of_both(lambda c: split(c).rows),
        "entropy": lambda: of_both(lambda c: stream(models[c], tokens).rows()),
        "curves": lambda: of_both(lambda c: split(c).curves),
        "maps": lambda: templates("none").maps,
    }


def fitted_probes(
    decoders: Sequence[nn.Module],
    untrained: Sequence[nn.Module],
    tokens: torch.Tensor,
    *,
    sites: Sequence[str] | None = None,
    targets: Sequence[str] = PROBE_TARGETS,
    seed: int = 0,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Ridge probes at every site, beside their controls, over all seeds of a model."""
    return probe_positions(
        list(decoders),
        tokens,
        sites,
        targets=targets,
        untrained=list(untrained),
        seed=seed,
        on_progress=on_progress,
    )


def extrapolation(
    decoders: Sequence[nn.Module],
    untrained: Sequence[nn.Module],
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    *,
    fitted_length: int | None = None,
    seed: int = 0,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Probes behind the last layer, fitted to the first part of the sequences (a quarter of the longest by default) and
    scored by position beyond it."""
    last = block_site(n_layers_of(decoders[0]) - 1, RESID_POST)
    return probe_positions(
        list(decoders),
        tokens,
        [last],
        lengths=lengths,
        fitted_length=fitted_length or max(2, tokens.shape[1] // 4),
        untrained=list(untrained),
        seed=seed,
        on_progress=on_progress,
    )


def geometry(decoder: nn.Module, untrained: nn.Module, tokens: torch.Tensor, *, seed: int = 0) -> pd.DataFrame:
    """The parts of hidden states behind every layer, and how the variance of attention outputs falls with position."""
    traces = [trace(model, tokens, [EMBED, RESID_POST, ATTN_OUT]) for model in (decoder, untrained)]
    streams = [site for site in traces[0].values if not site.endswith(ATTN_OUT)]
    parts = decompose_hidden(traces[0], streams, untrained=traces[1], seed=seed).rows
    return pd.concat([parts, variance_by_position(traces[0], untrained=traces[1], seed=seed)], ignore_index=True)


def accuracy(decoder: nn.Module, data: StudyData) -> pd.DataFrame:
    """Exact match by length, of both held-out splits."""
    parts = []
    for split in ("validation", "test"):
        examples = getattr(data.splits, split)
        if examples:
            rows = exact_match(predict(decoder, examples, data.task.vocabulary, task=data.task))
            parts.append(rows.assign(split=split))
    return pd.concat(parts, ignore_index=True)


def shifted(decoder: Model, data: StudyData, *, seed: int = 0, most: int = 500) -> pd.DataFrame:
    """Loss and accuracy on trained lengths when all positions are shifted, as far as the model knows positions."""
    examples = encode(data.splits.validation[:most], data.task.vocabulary)
    last = decoder.encoding.last_position if isinstance(decoder, Decoder) else None
    length = examples.tokens.shape[1]
    shifts = [k for k in SHIFTS if last is None or k + length - 1 <= last]
    return shifted_positions(decoder, examples, shifts, seed=seed)


def temperature(decoder: nn.Module, data: StudyData, *, seed: int = 0, most: int = 300) -> pd.DataFrame:
    """Loss and accuracy on trained lengths and on the test's under one attention temperature for the whole model."""
    parts = []
    for split, name in (("trained", "validation"), ("longer", "test")):
        examples = getattr(data.splits, name)[:most]
        if examples:
            swept = sweep_scale(decoder, encode(examples, data.task.vocabulary), batch_size=64, seed=seed)
            parts.append(swept.assign(split=split))
    return pd.concat(parts, ignore_index=True)


def own_t5(model: nn.Module) -> dict[str, Any]:
    """The bias that a decoder with T5's encoding has learned, as the measurements want it; nothing of others."""
    decoder = our_decoder(model)
    if decoder is None or not isinstance(decoder.encoding, T5):
        return {}
    return {"t5_table": decoder.encoding.weight.detach(), "t5_max_distance": decoder.encoding.max_distance}


def pair_stages(
    models: Mapping[str, Sequence[nn.Module]],
    untrained: Mapping[str, Sequence[nn.Module]],
    tokens: torch.Tensor,
    seed: int,
) -> dict[str, Measure]:
    """The stages that need all models at once: their distances, those between seeds of one of them included; which one
    each of them is nearest to; and how far each is from the table that a model with T5's encoding has learned."""
    controls = {"none": models, "untrained": untrained}

    def of_both(measure: Callable[[dict[str, list[Trace]]], pd.DataFrame]) -> pd.DataFrame:
        parts = []
        for control, by_name in controls.items():
            if all(by_name.get(name) for name in models):
                traces = {name: [trace(m, tokens, [PATTERN]) for m in by_name[name]] for name in models}
                parts.append(measure(traces).assign(control=control))
        return pd.concat(parts, ignore_index=True).rename(columns={"distance": "metric"})

    def distances(traces: dict[str, list[Trace]]) -> pd.DataFrame:
        return pd.concat(
            [compare_models(traces, aggregate=a, seed=seed) for a in ("minimum", "matching")], ignore_index=True
        )

    stages = {"model_distance": lambda: of_both(distances)}
    if len(models) > 2:
        stages["model_order"] = lambda: of_both(
            lambda traces: pd.concat(
                [compare_to(traces, name, seed=seed) for name in traces], ignore_index=True
            ).rename(columns={"difference": "value"})
        )
    with_table = [(name, model) for name, of in models.items() for model in of[:1] if own_t5(model)]
    if with_table:
        owner, model = with_table[0]

        def trained_table(traces: dict[str, list[Trace]]) -> pd.DataFrame:
            found = []
            for name, (first, *_) in traces.items():
                if n_heads_of(models[name][0]) == n_heads_of(model):
                    rows = compare_templates(first, ["t5"], **own_t5(model), seed=seed)
                    found.append(rows.assign(encoding=name, table=owner))
            return pd.concat(found, ignore_index=True)

        stages["trained_t5"] = lambda: of_both(trained_table)
    return stages
