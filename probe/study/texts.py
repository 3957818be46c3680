"""What models are looked at on where no study says it: texts in a model's own words, a file of ids, or a task."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from probe.errors import ProbeError
from probe.measure.data import TracedSequences, last_position_of
from probe.models.anatomy import d_vocab_of, n_ctx_of
from probe.study.config import StudyConfig, StudyData
from probe.study.places import Place, read_tokens
from probe.tasks import make_task
from probe.tasks.corpus import PYTHON
from probe.tasks.passkey import Passkey
from probe.tasks.tokenizer_files import has_tokenizer
from probe.tasks.tokenizers import shared_tokenizer


def text_task(text: str, tokenizer: str, length: int, d_vocab: int, place: str | Path) -> Passkey:
    """Texts in the words of a model: a folder of them, or "python", the standard library's sources.

    Args:
        text: the folder of the texts.
        tokenizer: the folder of the tokenizer; "" for bytes.
        length: tokens of the sequences that are wanted of it.
        d_vocab: how many tokens the model knows.
        place: where the model is from, for the error.

    Raises:
        ProbeError: where the model does not have these tokens.
    """
    long = max(4 * length, 512)
    task = Passkey(text=text, tokenizer=tokenizer, train_length=long, test_length=2 * long)
    if not task.vocabulary.fits(d_vocab):
        raise ProbeError(
            f"{place}: texts need a folder with the model's tokenizer, a model of bytes, or a file of token ids; this "
            f"is a model of {d_vocab} tokens with none of these"
        )
    return task


def text_task_of(
    models: Mapping[str, Sequence[nn.Module]],
    folders: Mapping[str, Path],
    options: Mapping[str, Any] | None,
    **given: Any,
) -> tuple[Passkey, bool]:
    """Texts in the words of models, as long as these were trained with, and whether that length is known.

    It is known where it is given, where a study says it, and of released models (the least n_ctx). Where nothing says
    it, it is what the task has by default, or the longest that all of these models know.

    Args:
        models: by name, the trainings of each.
        folders: by name, where the models are.
        options: those of the task "passkey" with which a study trained the models; None where there is no such study.
        given: options that go before all others.

    Raises:
        ProbeError: where models share no tokenizer, or for an option that the task refuses.
    """
    values = {**(options or {}), **given}
    if "tokenizer" not in values:
        values["tokenizer"] = shared_tokenizer(folders)
    if options is None:
        n_ctx = [n_ctx_of(models[name][0]) for name, folder in folders.items() if has_tokenizer(folder)]
        if known := [n for n in n_ctx if n is not None]:
            values.setdefault("train_length", min(known))
    trained = "train_length" in values or options is not None
    length = values.get("train_length", Passkey.train_length)
    task = make_task("passkey", {**values, "test_length": max(values.get("test_length", 0), 2 * length)})
    assert isinstance(task, Passkey)
    if not trained and (last := last_position_of(of[0] for of in models.values())) is not None:
        task = replace(task, train_length=max(task.least_length, min(length, last + 1)))
    return task, trained


def text_sequences(task: Passkey, length: int, n: int, seed: int) -> TracedSequences:
    """Held-out pieces of text of so many tokens, up to n of them."""
    pieces = task.plain("test", length, n, np.random.default_rng(seed))
    words = task.vocabulary
    tokens = [[*words.prompt(piece), *words.completion(piece)] for piece in pieces]
    return TracedSequences(torch.tensor(tokens), None, f"texts of {task.text}")


def sequences_for(
    models: Mapping[str, Sequence[nn.Module]],
    places: Mapping[str, Sequence[Place]],
    config: StudyConfig,
    *,
    tokens: str | None = None,
    text: str | None = None,
) -> TracedSequences:
    """The sequences on which these models are looked at: ids of a file; else texts, where they are asked for or where a
    model's folder has a tokenizer; else the task of the settings.

    Raises:
        ProbeError: where models share no tokenizer, or the task's vocabulary is not theirs: ids of another vocabulary
            would be measured without complaint.
    """
    if tokens is not None and text is not None:
        raise ProbeError(f"sequences must be either of --tokens or of --text, got both ({tokens} and {text})")
    if tokens is not None:
        return TracedSequences(read_tokens(tokens), None, f"token ids of {tokens}")
    folders = {name: first.folder for name, (first, *_) in places.items()}
    sizes = {name: d_vocab_of(first) for name, (first, *_) in models.items()}
    if text is not None or any(has_tokenizer(folder) for folder in folders.values()):
        tokenizer = shared_tokenizer(folders)
        tasks = [
            text_task(text or PYTHON, tokenizer, config.trace_length, size, folders[name])
            for name, size in sizes.items()
        ]
        return text_sequences(tasks[0], config.trace_length, config.trace_sequences, config.seed)
    data = StudyData.of(config)
    for name, size in sizes.items():
        if not data.task.vocabulary.fits(size):
            raise ProbeError(
                f"{name} knows {size} tokens, and the task {config.task!r} has {len(data.task.vocabulary)}: say what "
                "it is to be looked at on (--tokens FILE, --text FOLDER, or --task NAME with its options)"
            )
    return data.traced(config)
