"""Checkpoints of text models beyond their length: perplexity, passkeys and temperatures, without a study's training."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from probe.errors import ProbeError
from probe.extrapolation import passkey, perplexity, scaled
from probe.extrapolation.perplexity import loss_by_position
from probe.files import write_file, write_text
from probe.models import checkpoint
from probe.models.build import Model
from probe.models.decoder import Decoder
from probe.report.extrapolation_sections import extrapolation_figures, extrapolation_sections, extrapolation_summary
from probe.report.page import render_page
from probe.study.beyond import Beyond, beyond_stages, scale_of
from probe.study.stages import read_stage, write_stage
from probe.tasks.passkey import DEPTHS, Passkey


def check_text_models(models: Mapping[str, Sequence[Decoder]], task: Passkey) -> dict[str, Decoder]:
    """The first model of each name, which must be of this task's bytes, or of its tokenizer.

    Raises:
        ProbeError: for a model of another vocabulary, or one under a bridge.
    """
    kind = f"those in {task.tokenizer}," if task.tokenizer else "bytes,"
    how = "" if task.tokenizer else " (as probe study --preset text trains; others want a tokenizer)"
    for name, (first, *_) in models.items():
        if not isinstance(first, Model):
            raise ProbeError(f"{name}: a model of this package was wanted, got a {type(first).__name__}")
        if not task.vocabulary.fits(first.config.d_vocab):
            raise ProbeError(
                f"{name}: a model of {task.vocabulary.wanted}, {kind} was wanted{how}, "
                f"got one of {first.config.d_vocab}"
            )
    return {name: of[0] for name, of in models.items()}


def perplexity_checkpoints(
    models: Mapping[str, Decoder], beyond: Beyond, folder: str | Path, *, contexts: Sequence[int] | None = None
) -> pd.DataFrame:
    """Perplexity by context, and loss by position, of held-out texts as long as the longest context; rows and a report
    go into the folder. The second half of each text counts."""
    contexts = tuple(contexts or beyond.within(*models.values()).contexts)
    prefix = beyond.task.plain_prefix
    longest = max(contexts)
    if longest < len(prefix) + 4:
        raise ProbeError(f"contexts must be of at least {len(prefix) + 4} tokens, got {longest}")
    texts = beyond.texts("test", longest, beyond.n_texts).tokens[:, len(prefix) :]
    half, parts = texts.shape[1] // 2, []
    for name, model in models.items():
        found = perplexity(model, texts, contexts, prefix=prefix, score_from=half, seed=beyond.seed)
        parts.append(found.assign(measurement="perplexity", encoding=name))
        found = loss_by_position(model, texts, prefix=prefix, seed=beyond.seed)
        parts.append(found.assign(measurement="loss_by_position", encoding=name))
    return _finish(parts, beyond, folder, "Perplexity by length")


def passkey_checkpoints(
    models: Mapping[str, Decoder],
    beyond: Beyond,
    folder: str | Path,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
) -> pd.DataFrame:
    """Passkeys over lengths and depths; rows and a report go into the folder."""
    lengths, parts = tuple(lengths or beyond.within(*models.values()).contexts), []
    for name, model in models.items():
        found = passkey(model, beyond.task, lengths, depths, n=beyond.n_prompts, seed=beyond.seed)
        parts.append(found.assign(measurement="passkey", encoding=name))
    return _finish(parts, beyond, folder, "Passkey retrieval")


def scale_checkpoints(
    models: Mapping[str, Decoder],
    beyond: Beyond,
    folder: str | Path,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> pd.DataFrame:
    """Fit temperatures for every extended length and measure what they do: perplexity, passkeys, entropy, the law.

    The folder gets the rows, a report, and under ``models`` an ordinary checkpoint for each scale of heads, with the
    scale in its weights. A finished stage is not done again.
    """
    folder, parts = Path(folder), []
    for name, model in models.items():

        def kept(stage: str, measure: Callable[[], pd.DataFrame], name: str = name) -> pd.DataFrame:
            write_stage(folder, f"{stage}-{name}", measure)
            return read_stage(folder, f"{stage}-{name}")

        stages = beyond_stages(model, beyond, kept)
        if not stages:
            raise ProbeError(f"{name}: a model that knows positions beyond {beyond.task.train_length} was wanted")
        for stage, measure in stages.items():
            parts.append(kept(stage, measure).assign(measurement=stage, encoding=name))
            say(f"{name}: {stage}")
        scales = read_stage(folder, f"head_scale-{name}")
        for (kind, extension), rows in scales.groupby(["variant", "extension"], sort=False):
            checkpoint.save(scaled(model, scale_of(rows)), folder / "models" / f"{name}-{kind}-{extension:g}x")
    return _finish(parts, beyond, folder, "Attention temperature")


def _finish(parts: list[pd.DataFrame], beyond: Beyond, folder: str | Path, title: str) -> pd.DataFrame:
    rows, length = pd.concat(parts, ignore_index=True), beyond.task.train_length
    for column, missing in (("variant", "none"), ("extension", float("nan"))):
        rows[column] = rows[column].fillna(missing) if column in rows else missing
    drawn = extrapolation_figures(rows, length)
    page = render_page(title, extrapolation_summary(rows, length), extrapolation_sections(rows, drawn))
    write_file(Path(folder) / "rows.parquet", lambda path: rows.to_parquet(path, index=False))
    write_text(Path(folder) / "report.html", page)
    return rows
