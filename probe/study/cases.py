"""Models that were named, with whatever they can be measured on."""

from collections.abc import Mapping, Sequence

from torch import nn

from probe.measure.base import Case
from probe.measure.data import Texts
from probe.models.anatomy import d_vocab_of, n_ctx_of
from probe.study.config import StudyConfig, StudyData
from probe.study.places import Place, check_file_names
from probe.study.texts import sequences_for, text_task
from probe.tasks.corpus import PYTHON
from probe.tasks.passkey import Passkey
from probe.tasks.tokenizer_files import has_tokenizer


def measured_cases(
    models: Mapping[str, Sequence[nn.Module]],
    places: Mapping[str, Sequence[Place]],
    config: StudyConfig,
    *,
    tokens: str | None = None,
    text: str | None = None,
) -> list[Case]:
    """The cases of models: the sequences on which they are looked at; the examples of the settings' task, where the
    sequences are that task's; texts in their own tokens, where they are models of text; and the run that trained each.

    Args:
        models: by name, the trainings of each.
        places: by name, where they are.
        config: a study's settings, whose task the models were trained on.
        tokens: a file of ids in place of texts or a task's sequences.
        text: a folder of texts, or "python".

    Raises:
        ProbeError: where models share no tokenizer, or the task's vocabulary is not theirs.
    """
    check_file_names(models)
    traced = sequences_for(models, places, config, tokens=tokens, text=text)
    of_task = traced.data == f"task {config.task}"
    examples = StudyData.of(config) if of_task else None
    cases = []
    for name, of in models.items():
        folder = places[name][0].folder
        texts = None
        if examples is not None and isinstance(examples.task, Passkey):
            texts = Texts(examples.task, config.extensions, seed=config.seed)
        elif tokens is None and not of_task:
            tokenizer = str(folder) if has_tokenizer(folder) else ""
            task = text_task(text or PYTHON, tokenizer, _known(of[0], config), d_vocab_of(of[0]), folder)
            texts = Texts(task, config.extensions, seed=config.seed)
        run = folder.parent if any((folder.parent / "checkpoints").glob("step-*")) else None
        cases.append(Case(name, of, traced, config.seed, examples=examples, texts=texts, run=run))
    return cases


def _known(model: nn.Module, config: StudyConfig) -> int:
    """A quarter of the length with which a released model was trained, as ``text_task`` takes it."""
    known = n_ctx_of(model)
    return known // 4 if known else config.trace_length
