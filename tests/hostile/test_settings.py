"""Settings from outside: JSON files and flags of the commands, and the dataclasses that they are made of."""

import json
from pathlib import Path

import pytest
from hostile import command, fresh, idle, refused, tree
from hypothesis import example
from hypothesis import strategies as st
from junk import JUNK, TEXTS, given, mutated

from probe.models.attention_functions import ATTENTION_FUNCTIONS
from probe.models.config import DecoderConfig
from probe.models.encodings import ENCODINGS
from probe.models.encodings.base import options_of
from probe.models.kinds import config_from_dict
from probe.options import _flag, _kinds
from probe.study import StudyConfig
from probe.sweep import SweepConfig
from probe.tasks import TASKS, make_task
from probe.training import TrainingConfig

DECODER = {"d_vocab": 19, "n_ctx": 32, "n_layers": 2, "d_model": 32, "n_heads": 4}
CLOCKWORK = {"model": "clockwork", "d_vocab": 19, "d_model": 32, "n_modules": 4}
OPTIONS = sorted(
    {option for kind in (*ENCODINGS.values(), *ATTENTION_FUNCTIONS.values()) for option in options_of(kind)}
)
STUDY = {
    "task": "copy",
    "task_options": {"train_length": 4, "test_length": 8},
    "encodings": ["none", "t5"],
    "load": {"t5": "somewhere"},
    "seeds": {"none": 2},
    "model": {"n_layers": 1, "d_model": 16, "n_heads": 2, "encoding_options": {}, "position_layers": [0]},
    "training": {"steps": 2, "learning_rate": 1e-3, "mixed_precision": "no"},
    "verify_lengths": [64],
    "extensions": [2],
    "trace_length": 4,
}
SWEEP = {
    "tasks": {"mine": {"task": "addition", "train_length": 2, "test_length": 3}, "copy": {}},
    "encodings": {"a": {"encoding": "rotary", "encoding_options": {"base": 100.0}}, "rnn": CLOCKWORK | {"d_vocab": 3}},
    "scratchpads": {"none": [], "some": ["remaining"]},
    "seeds": [0, 1],
    "model": {"n_layers": 1, "d_model": 16, "n_heads": 2},
    "training": {"steps": 2},
    "keep_models": True,
}


@given(mutated(DECODER | dict.fromkeys(("activation", "bias", "position_layers", "n_kv_heads", "d_head"))))
@example(DECODER | {"n_ctx": 10**30, "encoding": "learned"})
@example(DECODER | {"n_layers": 10**9})
@example(DECODER | {"n_heads": 2**30, "d_model": 2**30, "encoding": "alibi"})
@example(DECODER | {"activation": ["relu"]})
@example(DECODER | {"position_layers": 1, "encoding": "rotary"})
@example(DECODER | {"position_layers": [True], "encoding": "rotary"})
@example(DECODER | {"norm_eps": 10**400})
@example(DECODER | {"d_mlp": 10**5000})
@example(DECODER | {"d_model": 0})
def test_decoder_configs(values):
    refused(lambda: config_from_dict(values))


@given(mutated(CLOCKWORK | {"periods": [1, 2, 4, 8]}))
@example(CLOCKWORK | {"d_model": 2**20, "n_modules": 2**20})
def test_clockwork_configs(values):
    refused(lambda: config_from_dict(values))


@given(st.sampled_from(sorted(ENCODINGS)), st.dictionaries(st.sampled_from(OPTIONS), JUNK, max_size=3))
@example("randomized", {"max_position": 10**12})
@example("cope", {"npos_max": 2**31 - 1})
@example("rotary", {"base": 10**400})
@example("rotary", {"base": 1e308, "scaling": "ntk", "factor": 1e308})
@example("t5", {"n_buckets": 3, "max_distance": 10**400})
@example("randomized", {"base": ["alibi"]})
def test_options_of_encodings(name, options):
    refused(lambda: DecoderConfig(**DECODER, encoding=name, encoding_options=options))


@given(st.sampled_from(sorted(ATTENTION_FUNCTIONS)), st.dictionaries(st.sampled_from(OPTIONS), JUNK, max_size=3))
@example("log_length", {"a": 10**400})
def test_options_of_attention_functions(name, options):
    refused(lambda: DecoderConfig(**DECODER, attention_function=name, attention_options=options))


@given(mutated({"steps": 10, "learning_rate": 1e-3, "seed": 0, "warmup": 0.1, "mixed_precision": "no"}))
@example({"learning_rate": float("nan")})
@example({"steps": True})
@example({"seed": 10**30})
@example({"mixed_precision": []})
def test_training_configs(values):
    refused(lambda: TrainingConfig(**{name: v for name, v in values.items() if name in _kinds(TrainingConfig)}).rate(1))


TASK_OPTIONS = sorted({name for task in TASKS.values() for name in _kinds(task)})


@given(
    st.sampled_from(sorted(TASKS)) | JUNK,
    st.dictionaries(st.sampled_from(TASK_OPTIONS) | TEXTS, JUNK, max_size=3),
)
@example("copy", {"n_symbols": 10**9})
@example("lego", {"test_length": 10**9})
@example("passkey", {"text_share": 10**400})
@example(["copy"], {})
def test_options_of_tasks(name, options):
    refused(lambda: len(make_task(name, options).vocabulary))


def written(folder: Path, values: object) -> Path:
    path = folder / "settings.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def of_command(name: str, values: object) -> None:
    """A command with that file touches no folder before all is read."""
    with fresh() as folder, idle():
        command(name, "--config", written(folder, values), "--folder", folder / "out")
        assert tree(folder) == {"settings.json"}


@given(mutated(STUDY))
@example('{"task": "copy", "task": "scan"}')
@example('{"task": "\\ud800"}')
@example('{"task": "copy", "load": {"none": "a\\u0000b"}}')
@example('{"seed": ' + "9" * 5000 + "}")
@example('{"model": ' + "[" * 100_000 + "]" * 100_000 + "}")
@example("")
@example("null")
@example({"task": ["copy"]})
@example({"task": "jsonl", "task_options": {"path": "/"}})
@example({"load": {"none": 3}})
@example({"model": {"d_model": 10**400}})
@example({"training": {"learning_rate": float("nan")}})
@example({"seeds": {"none": 10**12}})
@example({"trace_length": 10**30})
def test_studies(values):
    of_command("study", values)


@given(mutated(STUDY))
def test_trainings(values):
    of_command("train", values)


@given(mutated(SWEEP))
@example({"scratchpads": [["none"]]})
@example({"tasks": {"a": {"task": ["copy"]}}})
@example({"tasks": {"x" * 300: {"task": "copy"}}})
@example({"seeds": [0, 10**40]})
@example({"encodings": {"a": {"encoding": {}}}})
@example({"encodings": {"a": {"model": "clockwork", "n_modules": 10**9}}})
def test_sweeps(values):
    of_command("sweep", values)


@given(TEXTS)
@example("../x")
@example("/etc/x")
@example("a/b")
@example("CON")
@example("x" * 300)
@example("..")
def test_labels_of_a_sweep_stay_in_its_folder(label):
    values = {"tasks": {label: {"task": "copy"}}, "encodings": {label: {"encoding": "t5"}}}

    def paths():
        for run in SweepConfig.from_dict(values).runs():
            path = Path("/results") / f"{run.name}.parquet"
            assert path.resolve().parent == Path("/results") and len(path.name.encode()) < 256

    refused(paths)


FLAGS = [
    _flag(name)
    for kind in (StudyConfig, DecoderConfig, TrainingConfig)
    for name in _kinds(kind)
    if name not in ("model", "training", "d_vocab", "seed")
]
VALUES = st.one_of(
    TEXTS,
    st.sampled_from(["", ",", "=", "a=", "nan", "inf", "-1", "1e999", "true", "9" * 5000, "a=" + "[" * 5000, "a=NaN"]),
    st.integers().map(str),
    st.floats().map(str),
    st.dictionaries(TEXTS, JUNK, max_size=2).map(lambda d: ",".join(f"{k}={v}" for k, v in d.items())),
)


@given(st.sampled_from(["study", "train", "sweep"]), st.lists(st.tuples(st.sampled_from(FLAGS), VALUES), max_size=3))
@example("study", [("--task", "\udcff")])
@example("study", [("--task", "a\0b")])
@example("study", [("--task-options", "train_length=" + "9" * 5000)])
@example("study", [("--encoding-options", "base=" + "[" * 100_000)])
@example("study", [("--task", "\x1b[2J\u202e")])
@example("study", [("--n-ctx", "9" * 5000)])
@example("study", [("--encodings", "none,none")])
@example("sweep", [("--seeds", "-1")])
def test_flags(name, given_flags):
    with fresh() as folder, idle():
        command(name, *(f"{flag}={value}" for flag, value in given_flags), "--folder", folder / "out")
        assert not tree(folder)


@given(st.lists(st.sampled_from(["study", "--folder", "--", "-x", "--json", "models"]) | TEXTS, max_size=4))
@example(["\udcff"])
@example(["\ud800"])
@example(["--\0"])
def test_command_lines(arguments):
    with idle():
        command("examine", *arguments, "--device", "no such device")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\xef\xbb\xbf{}", b"{", b'{"a": 1', b"[" * 10**6])
def test_what_is_no_json(tmp_path, content):
    (tmp_path / "settings.json").write_bytes(content)
    with idle():
        assert "must be JSON" in command("study", "--config", tmp_path / "settings.json")


@pytest.mark.parametrize("seed", ["-1", "9" * 30, "x"])
@pytest.mark.parametrize("name", ["league", "examine", "perplexity", "verify"])
def test_seeds(name, seed):
    assert "invalid seed value" in command(name, f"--seed={seed}", "nowhere")


def test_a_folder_and_a_device_in_place_of_a_file(tmp_path):
    assert "must be a plain file" in command("study", "--config", tmp_path)
    assert "must be a plain file, got a device" in command("study", "--config", "/dev/zero")
