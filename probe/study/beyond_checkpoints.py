"""Checkpoints of text models beyond their length: perplexity, passkeys and temperatures, without a study's training."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from probe.errors import ProbeError
from probe.extrapolation import check_can_scale, scaled
from probe.measure.base import Case
from probe.measure.data import Texts, TracedSequences, check_contexts
from probe.measure.run import made_on, measure_models
from probe.models import checkpoint
from probe.models.anatomy import d_vocab_of
from probe.models.decoder import Decoder
from probe.models.identity import weights_digest
from probe.progress import OnProgress, Steps, untold
from probe.report.measured import measured_page
from probe.report.page import Line
from probe.report.sections import Results
from probe.runs import RunFolder
from probe.study.beyond import Beyond, beyond_stages, scale_of
from probe.study.places import check_file_names
from probe.tasks.passkey import DEPTHS, Passkey
from probe.tasks.tokenizers import read_tokenizer


def check_text_models(models: Mapping[str, Sequence[nn.Module]], task: Passkey) -> dict[str, nn.Module]:
    """The first model of each name, which must be of this task's bytes, or of its tokenizer.

    Raises:
        ProbeError: for a model of another vocabulary.
    """
    kind = f"those in {task.tokenizer}," if task.tokenizer else "bytes,"
    how = "" if task.tokenizer else " (as probe study --preset text trains; others want a tokenizer)"
    for name, (first, *_) in models.items():
        if not task.vocabulary.fits(d_vocab_of(first)):
            raise ProbeError(
                f"{name}: a model of {task.vocabulary.wanted}, {kind} was wanted{how}, got one of {d_vocab_of(first)}"
            )
    return {name: of[0] for name, of in models.items()}


def perplexity_checkpoints(
    models: Mapping[str, nn.Module],
    texts: Texts,
    folder: str | Path,
    *,
    contexts: Sequence[int] | None = None,
    command: str | None = None,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Measure perplexity by context, and loss by position, of held-out texts as long as the longest context; write rows
    and a report into a folder. The second half of each text counts.

    Args:
        models: by name.
        texts: in the models' tokens.
        folder: where rows and report go.
        contexts: in tokens; the trained length and its extensions by default.
        command: what was typed; the page tells it.
        on_progress: called with how many measurements are done, and how many there are.

    Raises:
        ProbeError: where the folder is another command's or holds other work, or another process works there.
    """
    chosen = list(contexts or texts.within(*models.values()).contexts)
    check_contexts(texts, chosen)
    options = {name: {"contexts": chosen} for name in ("perplexity", "loss_by_position")}
    return _measure(models, texts, folder, "perplexity", options, "Perplexity by length", command, on_progress)


def passkey_checkpoints(
    models: Mapping[str, nn.Module],
    texts: Texts,
    folder: str | Path,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    command: str | None = None,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Measure passkeys over lengths and depths; write rows and a report into a folder.

    Args:
        models: by name.
        texts: in the models' tokens.
        folder: where rows and report go.
        lengths: of prompts, in tokens; the trained length and its extensions by default.
        depths: where the key stands, shares of the text before it, each in [0, 1].
        command: what was typed; the page tells it.
        on_progress: called with how many measurements are done, and how many there are.

    Raises:
        ProbeError: where the folder is another command's or holds other work, or another process works there.
    """
    chosen = list(lengths or texts.within(*models.values()).contexts)
    options = {"passkey": {"lengths": chosen, "depths": list(depths)}}
    return _measure(models, texts, folder, "passkey", options, "Passkey retrieval", command, on_progress)


def _measure(
    models: Mapping[str, nn.Module],
    texts: Texts,
    folder: str | Path,
    command: str,
    options: Mapping[str, Mapping[str, Any]],
    title: str,
    typed: str | None,
    on_progress: OnProgress,
) -> pd.DataFrame:
    check_file_names(models)
    traced = TracedSequences(texts.held_out_of(texts.task.train_length), None, f"texts of {texts.task.text}")
    cases = [Case(name, [model], traced, texts.seed, texts=texts) for name, model in models.items()]
    return measure_models(
        cases, folder, list(options), options=options, command=command, title=title, typed=typed,
        lead=[_looked_at(texts.task)], train_length=texts.train_length, on_progress=on_progress,
    )  # fmt: skip


def _looked_at(task: Passkey) -> Line:
    before = read_tokenizer(task.tokenizer).before if task.tokenizer else "<bos>"
    return Line("Looked at", f"Texts of {task.text}; before each of them stands: {before}.")


def scale_checkpoints(
    models: Mapping[str, nn.Module],
    beyond: Beyond,
    folder: str | Path,
    *,
    command: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Fit temperatures for every extended length and measure what they do: perplexity, passkeys, entropy, the law.

    The folder gets the rows, a report, and under ``models`` an ordinary checkpoint for each scale of heads, with the
    scale in its weights, but for models of transformers. A finished stage is not done again.
    ``on_progress`` is called with how many stages are done, and how many there are; ``command``, what was typed, is
    told on the page.

    Raises:
        ProbeError: where a model cannot be scaled, the folder is another command's or one for other models, settings or
            texts, or another process is at work there.
    """
    folder, parts = Path(folder), []
    check_file_names(models)

    def stages_of(
        name: str, run: RunFolder | None = None, on_progress: OnProgress = untold
    ) -> dict[str, Callable[[], pd.DataFrame]]:
        def kept(stage: str, measure: Callable[[], pd.DataFrame]) -> pd.DataFrame:
            assert run is not None  # nothing is measured before there is a folder
            run.measure(f"{stage}-{name}", measure)
            return run.rows(f"{stage}-{name}")

        return beyond_stages(models[name], beyond, kept, on_progress=on_progress)

    total = 0
    for name, model in models.items():
        try:
            check_can_scale(model)
        except ProbeError as error:
            raise ProbeError(f"{name}: {error}") from None
        if not (stages := stages_of(name)):
            raise ProbeError(f"{name}: the model must know positions beyond {beyond.task.train_length}")
        total += len(stages)
    steps = Steps(total, on_progress)
    with RunFolder.open(folder, "scale", _scale_identity(models, beyond)) as run:
        for name, model in models.items():
            encoding = Case(name, [model], TracedSequences(beyond.held_out)).encoding
            for stage, measure in stages_of(name, run, steps.within).items():
                if run.measure(f"{stage}-{name}", measure):
                    say(f"{name}: {stage}")
                rows = run.rows(f"{stage}-{name}")
                parts.append(rows.assign(measurement=stage, model=name, encoding=encoding))
                steps.step()
            if not isinstance(model, Decoder):
                continue  # a bridge has no checkpoints of ours; its scales are in the rows
            scales = run.rows(f"head_scale-{name}")
            for (kind, extension), rows in scales.groupby(["variant", "extension"], sort=False):
                checkpoint.save(scaled(model, scale_of(rows)), folder / "models" / f"{name}-{kind}-{extension:g}x")
        rows = pd.concat(parts, ignore_index=True).assign(data=f"texts of {beyond.task.text}")
        rows["variant"], rows["extension"] = rows["variant"].fillna("none"), rows["extension"].astype(float)
        results = Results(rows, train_length=beyond.train_length)
        made = made_on(next(iter(models.values())), command)
        page = measured_page("Attention temperature", results, made, lead=[_looked_at(beyond.task)])
        run.finish(rows, page, made.environment)
        return rows


def _scale_identity(models: Mapping[str, nn.Module], beyond: Beyond) -> dict[str, Any]:
    """What the stages in a folder depend on: the weights of the models, the settings, and the texts."""
    return {**beyond.settings, "models": {name: weights_digest(model) for name, model in models.items()}}
