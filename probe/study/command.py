"""What makes a page again: its command, the inverse of what the command line reads, and what it was made with."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probe.models.decoder import DecoderConfig
from probe.options import as_flags
from probe.runs import FORMAT
from probe.study.config import PRESETS, StudyConfig
from probe.training import TrainingConfig

GROUPS = {"": StudyConfig, "model": DecoderConfig, "training": TrainingConfig}
CONFIG_FILE = "study.json"


def study_command(config: StudyConfig, device: str) -> tuple[str, dict[str, str]]:
    """``probe study`` with the preset that wants the fewest flags, and all of these; where flags cannot say it, with a
    file of settings, whose name and text come second."""
    said = [
        (["--preset", name] if name != "default" else []) + flags
        for name, preset in PRESETS.items()
        if (flags := _from_preset(config, preset)) is not None
    ]
    files = {} if said else {CONFIG_FILE: json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, indent=2) + "\n"}
    flags = min(said, key=len) if said else ["--config", CONFIG_FILE]
    return shlex.join(["probe", "study", *flags, "--device", device]), files


def _from_preset(config: StudyConfig, preset: StudyConfig) -> list[str] | None:
    wanted, start = dataclasses.asdict(config), dataclasses.asdict(preset)
    if config.task != preset.task:
        start["task_options"] = {}  # another task's options do not carry over
    return as_flags(wanted, start, GROUPS)


def examine_command(places: Mapping[str, str | Path], settings: Any, device: str) -> str:
    """``probe examine`` of these models, by name, with the flags that differ from the defaults."""
    words = ["probe", "examine"]
    words += [str(place) if Path(place).name == name else f"{name}={place}" for name, place in places.items()]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        words += (
            [f"--{'' if value else 'no-'}{field.name}"] if isinstance(value, bool) else [f"--{field.name}", str(value)]
        )
    return shlex.join([*words, "--device", device])
