"""Models that were named, with whatever they can be measured on."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from probe.errors import ProbeError
from probe.measure.base import Case
from probe.measure.data import Texts, TracedSequences
from probe.models.open.recorded import Recorded
from probe.study.config import StudyConfig, StudyData
from probe.study.places import Place, check_file_names
from probe.study.texts import sequences_for, text_task_of
from probe.tasks.corpus import PYTHON


def measured_cases(
    models: Mapping[str, Sequence[nn.Module]],
    places: Mapping[str, Sequence[Place]],
    config: StudyConfig,
    *,
    tokens: str | None = None,
    text: str | None = None,
    train_length: int | None = None,
    n_texts: int = Texts.n_texts,
    n_prompts: int = Texts.n_prompts,
) -> list[Case]:
    """The cases of models: the sequences on which they are looked at; the examples of the settings' task, where the
    sequences are that task's; texts in their own tokens, where they are models of text; and the run that trained each.

    Args:
        models: by name, the trainings of each.
        places: by name, where they are.
        config: a study's settings, whose task the models were trained on.
        tokens: a file of ids in place of texts or a task's sequences.
        text: a folder of texts, or "python".
        train_length: tokens that models of text were trained with, where the caller knows it.
        n_texts: held-out texts, at least 1.
        n_prompts: prompts with a hidden key for each length and depth, at least 1.

    Raises:
        ProbeError: where models share no tokenizer, or the task's vocabulary is not theirs.
    """
    check_file_names(models)
    if any(isinstance(first, Recorded) for first, *_ in models.values()):
        return _recorded_cases(models, places, config.seed, given=tokens is not None or text is not None)
    traced = sequences_for(models, places, config, tokens=tokens, text=text)
    of_task = traced.data == f"task {config.task}"
    examples = StudyData.of(config) if of_task else None
    texts = None
    if config.task == "passkey" if of_task else tokens is None:
        given: dict[str, Any] = {} if of_task else {"text": text or PYTHON}
        if train_length is not None:
            given["train_length"] = train_length
        folders = {name: first.folder for name, (first, *_) in places.items()}
        task, trained = text_task_of(
            models, folders, config.task_options if config.task == "passkey" else None, **given
        )
        texts = Texts(task, config.extensions, n_texts, n_prompts, config.seed, trained)
        texts = texts.within(*(first for first, *_ in models.values()))
    cases = []
    for name, of in models.items():
        folder = places[name][0].folder
        run = folder.parent if any((folder.parent / "checkpoints").glob("step-*")) else None
        cases.append(Case(name, of, traced, config.seed, examples=examples, texts=texts, run=run))
    return cases


def _recorded_cases(
    models: Mapping[str, Sequence[nn.Module]], places: Mapping[str, Sequence[Place]], seed: int, *, given: bool
) -> list[Case]:
    """The cases of arrays, on the sequences that they were recorded on."""
    cases = []
    for name, (first, *others) in models.items():
        if not isinstance(first, Recorded) or others or given:
            raise ProbeError(
                "arrays are measured on the sequences that they were recorded on, each file for itself: leave out "
                "--tokens, --text and models that are no arrays"
            )
        traced = TracedSequences(first.get_buffer("tokens"), None, f"the sequences of {places[name][0].folder.name}")
        cases.append(Case(name, [first], traced, seed))
    if len({case.tokens.shape for case in cases}) > 1 or not all(torch.equal(c.tokens, cases[0].tokens) for c in cases):
        raise ProbeError("arrays that are measured together must be of the same sequences")
    return cases
