"""Checkpoints of text models beyond their length: perplexity, passkeys and temperatures, without a study's training."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from probe.errors import ProbeError
from probe.extrapolation import check_can_scale, passkey, perplexity, scaled
from probe.extrapolation.losses_by_context import loss_by_position
from probe.models import checkpoint
from probe.models.anatomy import d_vocab_of
from probe.models.decoder import Decoder
from probe.progress import OnProgress, Steps, untold
from probe.report.extrapolation_sections import extrapolation_figures, extrapolation_sections, extrapolation_summary
from probe.report.page import Line, Made, render_page
from probe.runs import COMMANDS, at_work, claim_folder
from probe.study.beyond import Beyond, beyond_stages, scale_of
from probe.study.command import made_with, write_page
from probe.study.places import check_file_names
from probe.study.stages import read_stage, write_stage
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
    beyond: Beyond,
    folder: str | Path,
    *,
    contexts: Sequence[int] | None = None,
    command: str | None = None,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Perplexity by context, and loss by position, of held-out texts as long as the longest context; rows and a report
    go into the folder. The second half of each text counts. ``on_progress`` is called with how many measurements of a
    model are done, and how many there are; ``command``, what was typed, is told on the page.

    Raises:
        ProbeError: where the folder is another command's, or another process is at work there.
    """
    contexts = tuple(contexts or beyond.within(*models.values()).contexts)
    prefix = beyond.task.plain_prefix
    longest = max(contexts)
    if longest < len(prefix) + 4:
        raise ProbeError(f"contexts must be of at least {len(prefix) + 4} tokens, got {longest}")
    texts = beyond.texts("test", longest, beyond.n_texts).tokens[:, len(prefix) :]
    half, parts, steps = texts.shape[1] // 2, [], Steps(2 * len(models), on_progress)
    with at_work(Path(folder), "perplexity"):
        for name, model in models.items():
            found = perplexity(
                model, texts, contexts, prefix=prefix, score_from=half, seed=beyond.seed, on_progress=steps.within
            )
            parts.append(found.assign(measurement="perplexity", encoding=name))
            steps.step()
            found = loss_by_position(model, texts, prefix=prefix, seed=beyond.seed)
            parts.append(found.assign(measurement="loss_by_position", encoding=name))
            steps.step()
        made = made_with(next(iter(models.values())), command)
        return _finish(parts, beyond, folder, "perplexity", "Perplexity by length", made)


def passkey_checkpoints(
    models: Mapping[str, nn.Module],
    beyond: Beyond,
    folder: str | Path,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    command: str | None = None,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Passkeys over lengths and depths; rows and a report go into the folder. ``on_progress`` is called with how many
    models are done, and how many there are; ``command``, what was typed, is told on the page.

    Raises:
        ProbeError: where the folder is another command's, or another process is at work there.
    """
    lengths, parts = tuple(lengths or beyond.within(*models.values()).contexts), []
    steps = Steps(len(models), on_progress)
    with at_work(Path(folder), "passkey"):
        for name, model in models.items():
            found = passkey(
                model, beyond.task, lengths, depths, n=beyond.n_prompts, seed=beyond.seed, on_progress=steps.within
            )
            steps.step()
            parts.append(found.assign(measurement="passkey", encoding=name))
        made = made_with(next(iter(models.values())), command)
        return _finish(parts, beyond, folder, "passkey", "Passkey retrieval", made)


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
    scale in its weights, but for models under a bridge. A finished stage is not done again.
    ``on_progress`` is called with how many stages are done, and how many there are; ``command``, what was typed, is
    told on the page.

    Raises:
        ProbeError: where a model cannot be scaled, the folder is another command's or one for other models, settings or
            texts, or another process is at work there.
    """
    folder, parts = Path(folder), []
    check_file_names(models)

    def kept(name: str, stage: str, measure: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        write_stage(folder, f"{stage}-{name}", measure)
        return read_stage(folder, f"{stage}-{name}")

    def stages_of(name: str, on_progress: OnProgress = untold) -> dict[str, Callable[[], pd.DataFrame]]:
        return beyond_stages(models[name], beyond, functools.partial(kept, name), on_progress=on_progress)

    total = 0
    for name, model in models.items():
        try:
            check_can_scale(model)
        except ProbeError as error:
            raise ProbeError(f"{name}: {error}") from None
        if not (stages := stages_of(name)):
            raise ProbeError(f"{name}: a model that knows positions beyond {beyond.task.train_length} was wanted")
        total += len(stages)
    steps = Steps(total, on_progress)
    with at_work(folder, "scale"):
        claim_folder(folder, COMMANDS["scale"].record, _scale_identity(models, beyond))
        for name, model in models.items():
            for stage, measure in stages_of(name, steps.within).items():
                parts.append(kept(name, stage, measure).assign(measurement=stage, encoding=name))
                say(f"{name}: {stage}")
                steps.step()
            if not isinstance(model, Decoder):
                continue  # a bridge has no checkpoints of ours; its scales are in the rows
            scales = read_stage(folder, f"head_scale-{name}")
            for (kind, extension), rows in scales.groupby(["variant", "extension"], sort=False):
                checkpoint.save(scaled(model, scale_of(rows)), folder / "models" / f"{name}-{kind}-{extension:g}x")
        made = made_with(next(iter(models.values())), command)
        return _finish(parts, beyond, folder, "scale", "Attention temperature", made)


def _scale_identity(models: Mapping[str, nn.Module], beyond: Beyond) -> dict[str, Any]:
    """What the stages in a folder depend on: the weights of the models, the settings, and the texts."""
    texts = beyond.texts("test", beyond.task.train_length, beyond.n_texts)
    return {
        "models": {name: checkpoint.digest_of(model.state_dict()) for name, model in models.items()},
        "texts": checkpoint.digest_of({"tokens": texts.tokens}),
        **asdict(beyond),
    }


def _finish(
    parts: list[pd.DataFrame], beyond: Beyond, folder: str | Path, command: str, title: str, made: Made
) -> pd.DataFrame:
    task, length = beyond.task, beyond.task.train_length
    rows = pd.concat(parts, ignore_index=True).assign(data=f"texts of {task.text}")
    for column, missing in (("variant", "none"), ("extension", float("nan"))):
        rows[column] = rows[column].fillna(missing) if column in rows else missing
    drawn = extrapolation_figures(rows, length)
    before = read_tokenizer(task.tokenizer).before if task.tokenizer else "<bos>"
    on = Line("Looked at", f"Texts of {task.text}; before each of them stands: {before}.")
    summary, sections = [on, *extrapolation_summary(rows, length)], extrapolation_sections(rows, drawn)
    page = render_page(title, summary, sections, rows=rows, made=made)
    write_page(Path(folder), command, rows, page, made)
    return rows
