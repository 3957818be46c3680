"""The settings of a study or sweep: from presets, files and flags."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from probe.errors import unknown_name
from probe.files import read_json_object
from probe.options import add_options, flags

if TYPE_CHECKING:
    from probe.study import StudyConfig
    from probe.sweep import SweepConfig


def groups(settings: type) -> dict[str, type]:
    """The dataclasses whose fields are options, by the key under which a study's or a sweep's settings hold them."""
    from probe.models.decoder import DecoderConfig
    from probe.training import TrainingConfig

    return {"": settings, "model": DecoderConfig, "training": TrainingConfig}


def add_study_options(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    from probe.study import StudyConfig

    add_options(parser, groups(StudyConfig), without)


#: What the settings of a study mean for models that exist already.
OF_MODELS = {
    "task": "the task that the models were trained on, whose held-out sequences they are measured on: one of "
    "``probe.tasks.TASKS``; of a study's folder it is the study's",
    "task_options": "options of that task",
    "trace_sequences": "how many sequences of a task or of texts the models are measured on, at most; a file of "
    "--tokens is taken whole",
    "trace_length": "tokens of each of these sequences",
    "seed": "random seed",
}


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """The options of the sequences on which models that exist are measured."""
    from probe.study import StudyConfig

    parser.add_argument(
        "--preset",
        default="default",
        help="the settings of a study from which --task and the options after it have their defaults: default, text or "
        "paper; of a study's folder they are the study's (default: %(default)s)",
    )
    parser.add_argument("--config", metavar="FILE", help="a JSON file with such settings, in place of a preset")
    add_options(parser, groups(StudyConfig), only=tuple(OF_MODELS), meanings=OF_MODELS)


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """The options of texts beyond the trained length."""
    parser.add_argument(
        "--train-length",
        type=int,
        metavar="N",
        help="tokens that the models were trained with (default: what a study says, n_ctx of released models; "
        "where nothing says it, 256, and the report calls no length the trained one)",
    )
    parser.add_argument("--n-texts", type=int, default=32, metavar="N", help="held-out texts (default: %(default)s)")
    parser.add_argument(
        "--n-prompts",
        type=int,
        default=10,
        metavar="N",
        help="prompts with a hidden key for each length and depth (default: %(default)s)",
    )


def study_config(options: argparse.Namespace, study: "StudyConfig | None" = None) -> "StudyConfig":
    """Preset (or a study that there is), then file, then flags; each overrides what came before it, key by key."""
    from probe.study import PRESETS, StudyConfig

    if options.preset not in PRESETS:
        raise unknown_name("preset", options.preset, PRESETS)
    preset = study or PRESETS[options.preset]
    values = dataclasses.asdict(preset)
    file = {} if options.config is None else read_json_object(Path(options.config))
    for name, value in file.items():
        if name == "training" and isinstance(value, dict):
            value = {**values["training"], **value}
        values[name] = value
    said = flags(options)
    given = {"model": said.pop("model", {}), "training": said.pop("training", {}), "": said}
    if {**values, **said}["task"] != preset.task and "task_options" not in {**file, **said}:
        values["task_options"] = {}  # another task's options do not carry over
    for key, of in given.items():
        if not key:
            values |= of
        elif isinstance(values[key], dict):  # anything else is refused below
            values[key] = values[key] | of
    return StudyConfig.from_dict(values)


def sweep_config(options: argparse.Namespace) -> "SweepConfig":
    """Preset, then file, then flags."""
    from probe.sweep import PRESETS, SweepConfig

    if options.preset not in PRESETS:
        raise unknown_name("preset", options.preset, PRESETS)
    values = dataclasses.asdict(SweepConfig())
    file = {} if options.config is None else read_json_object(Path(options.config))
    for source in (PRESETS[options.preset], file, flags(options)):
        for name, value in source.items():
            inner = name in ("model", "training") and isinstance(value, dict) and isinstance(values[name], dict)
            values[name] = values[name] | value if inner else value
    return SweepConfig.from_dict(values)
