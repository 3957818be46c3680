"""The command that a page prints makes the page again."""

import dataclasses
import json
import shlex

import pytest

from probe.cli import build_parser
from probe.cli.settings import study_config
from probe.provenance import environment, git_revision
from probe.study import PRESETS, StudyConfig
from probe.study.command import examine_command, study_command
from probe.study.examine import ExamineConfig
from probe.study.places import find_checkpoints

DEFAULT = StudyConfig()


def parsed(command):
    program, name, *arguments = shlex.split(command)
    assert program == "probe"
    return build_parser([name]).parse_args([name, *arguments])


def training(**changes):
    return dataclasses.replace(DEFAULT.training, **changes)


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (DEFAULT, ""),
        (PRESETS["paper"], "--preset paper"),
        (dataclasses.replace(PRESETS["text"], seed=3), "--preset text --seed 3"),
        (dataclasses.replace(DEFAULT, task="copy", task_options={}), "--task copy"),
        (dataclasses.replace(DEFAULT, encodings=("none", "t5"), seeds={}), "--encodings none,t5 --seeds ''"),
        (
            dataclasses.replace(DEFAULT, task_options={"train_length": 8, "test_length": 9}),
            "--task-options train_length=8,test_length=9",
        ),
        (
            dataclasses.replace(DEFAULT, model={**DEFAULT.model, "bias": False, "dropout": 0.1}),
            "--bias false --dropout 0.1",
        ),
        (
            dataclasses.replace(DEFAULT, training=training(learning_rate=3e-5, steps=7)),
            "--steps 7 --learning-rate 3e-05",
        ),
        (dataclasses.replace(DEFAULT, load={"none": "my folder/a"}), "--load 'none=my folder/a'"),
        (dataclasses.replace(DEFAULT, load={"none": "$(touch x); 'y'"}), None),  # quoted somehow
    ],
)
def test_the_command_of_a_study_gives_its_settings(config, flags):
    command, files = study_command(config, "cpu")
    assert files == {} and study_config(parsed(command)) == config
    if flags is not None:
        assert command == " ".join(f"probe study {flags} --device cpu".split())


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(DEFAULT, load={"none": "a,b"}),
        dataclasses.replace(DEFAULT, training=training(seed=5)),
        dataclasses.replace(DEFAULT, load={"none": "17"}),  # would be read as a number
    ],
)
def test_what_flags_cannot_say_is_in_a_file(config, tmp_path, monkeypatch):
    command, files = study_command(config, "cpu")
    assert command == "probe study --config study.json --device cpu"
    (tmp_path / "study.json").write_text(files["study.json"])
    monkeypatch.chdir(tmp_path)
    assert study_config(parsed(command)) == config
    assert StudyConfig.from_dict(json.loads(files["study.json"])) == config


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"length": 32, "sequences": 12, "ablate": True},
        {"ablate": False, "tokens": "t t.npy", "needles": 0, "seed": 4},
    ],
)
def test_the_command_of_an_examination_gives_its_settings(settings, tmp_path):
    places = {}
    for name, place in (("a", "a"), ("other", "b c")):
        (tmp_path / place).mkdir()
        places[name] = tmp_path / place
    options = parsed(examine_command(places, ExamineConfig(**settings), "cpu"))
    names = [field.name for field in dataclasses.fields(ExamineConfig)]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    assert ExamineConfig(**given) == ExamineConfig(**settings) and options.device == "cpu"
    found, _ = find_checkpoints(options.models)
    assert {name: place.folder for name, (place,) in found.items()} == places


def test_no_git_is_no_trouble(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() is None and "revision" not in environment()


def test_a_checkout_of_something_else_is_not_ours(monkeypatch, tmp_path):
    monkeypatch.setattr("probe.provenance.__file__", str(tmp_path / "site-packages" / "probe" / "provenance.py"))
    (tmp_path / ".git").mkdir()
    assert git_revision() is None
