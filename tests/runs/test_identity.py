"""What a folder's numbers depend on is in its record: another content of the same files is another run."""

import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from tokenized import byte_level, gpt2, write_texts

from probe.cli import main
from probe.errors import ProbeError
from probe.files import write_text
from probe.measure import Case, Texts, TracedSequences
from probe.measure.identity import identity_of
from probe.models import checkpoint
from probe.models.checkpoint import save
from probe.models.decoder import DecoderConfig
from probe.study import StudyConfig, run_study
from probe.study import run as study_run
from probe.tasks import make_task
from probe.tasks.corpus import SPLITS, read_corpus
from probe.training import TrainingConfig, encode, train


def measure(folder, *words):
    return main(["measure", *map(str, words), "--folder", str(folder / "out"), "--device", "cpu"])


def textual(folder, **options):
    """A case with texts of a folder."""
    task = make_task("passkey", {"text": str(folder / "texts"), "train_length": 96, "test_length": 120, **options})
    return lambda model: Case("m", [model], TracedSequences(model_tokens(model)), texts=Texts(task, n_texts=2))


def model_tokens(model):
    import torch

    return torch.arange(12).reshape(2, 6) % model.config.d_vocab


@pytest.mark.parametrize("split", SPLITS)
def test_texts_count_by_their_content_wherever_they_lie(split, make_decoder, tmp_path, monkeypatch):
    write_texts(tmp_path / "texts")
    model = make_decoder()
    found = identity_of([textual(tmp_path)(model)], {})
    shutil.copytree(tmp_path / "texts", tmp_path / "elsewhere" / "texts")
    monkeypatch.chdir(tmp_path)
    from_here = make_task("passkey", {"text": "texts", "train_length": 96, "test_length": 120})
    for case in (
        textual(tmp_path / "elsewhere")(model),
        Case("m", [model], TracedSequences(model_tokens(model)), texts=Texts(from_here, n_texts=2)),
    ):
        assert identity_of([case], {}) == found
    file = tmp_path / "texts" / read_corpus("texts").files[split][-1]
    text = file.read_text()
    file.write_text(text[:-2] + ("x" if text[-2] != "x" else "y") + text[-1])
    changed = identity_of([textual(tmp_path)(model)], {})
    assert changed["texts"]["m"]["task"].pop("text") != found["texts"]["m"]["task"].pop("text")
    assert changed == found


def test_tokenizers_count_by_their_content(make_decoder, tmp_path):
    write_texts(tmp_path / "texts")
    for name in ("a", "b"):
        byte_level(tmp_path / name)
    model, tokenizers = make_decoder(d_vocab=400), []
    for change in (None, "b"):
        if change:
            settings = tmp_path / "b" / "tokenizer_config.json"
            settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": "a"}))
        both = [textual(tmp_path, tokenizer=str(tmp_path / name))(model) for name in ("a", "b")]
        tokenizers.append([identity_of([case], {})["texts"]["m"]["task"]["tokenizer"] for case in both])
    assert tokenizers[0][0] == tokenizers[0][1] == tokenizers[1][0] != tokenizers[1][1]


def test_measure_refuses_other_texts_and_names_the_setting_that_differs(tmp_path, monkeypatch, capsys):
    gpt2(tmp_path / "model")
    write_texts(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    only = ["--only", "loss_by_position", "--trace-length", "16", "--trace-sequences", "8"]
    assert measure(tmp_path, "model", "--text", "texts", *only) == 0
    stage = tmp_path / "out" / "rows" / "loss_by_position-model.parquet"
    before = stage.stat().st_mtime_ns
    assert measure(tmp_path, "model", "--text", os.path.abspath("texts"), *only) == 0
    assert stage.stat().st_mtime_ns == before
    with open(sorted((tmp_path / "texts").iterdir())[0], "a") as file:
        file.write("x")
    capsys.readouterr()
    assert measure(tmp_path, "model", "--text", "texts", *only) == 2
    assert "holds other work: it was begun with texts.model.task.text" in capsys.readouterr().err


def jsonl(path, **changed):
    """Examples of every split; ``changed`` are other last words of the targets of a split."""
    numbers = {"train": range(20), "validation": range(20, 25), "test": range(25, 35)}
    lines = [
        {"source": f"a {i} b", "target": f"b {changed.get(split, i)}", "length": 1 + (split == "test"), "split": split}
        for split in SPLITS
        for i in numbers[split]
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")


@pytest.fixture
def begun(monkeypatch):
    """A study that trains and measures nothing."""

    def leave_something(config, run, *rest):
        write_text(run.path / "rows" / "a", "begun")
        return pd.DataFrame()

    monkeypatch.setattr(study_run, "_run", leave_something)

    def begin(folder, **settings):
        small = {"encodings": ("none",), "model": {"n_layers": 1, "d_model": 8, "n_heads": 1}, "trace_length": 4}
        run_study(StudyConfig(**(small | settings)), folder, device="cpu", jobs=1)

    return begin


@pytest.mark.parametrize("split", SPLITS)
def test_a_study_refuses_other_examples_of_any_split(split, begun, tmp_path):
    path = tmp_path / "examples.jsonl"
    settings = {"task": "jsonl", "task_options": {"path": str(path), "train_length": 1}}
    jsonl(path)
    begun(tmp_path / "out", **settings)
    begun(tmp_path / "out", **settings)
    jsonl(path, **{split: "0" if split != "train" else "1"})
    with pytest.raises(ProbeError, match=r"begun with data\.splits"):
        begun(tmp_path / "out", **settings)
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    assert StudyConfig.from_dict(record).task_options == settings["task_options"]


def test_a_study_of_text_refuses_another_file_of_any_split(begun, tmp_path):
    write_texts(tmp_path / "texts")
    options = {"text": str(tmp_path / "texts"), "train_length": 96, "test_length": 120}
    settings = {"task": "passkey", "task_options": options, "n_train": 2, "n_validation": 2, "n_test": 2}
    begun(tmp_path / "out", **settings)
    with open(tmp_path / "texts" / read_corpus(str(tmp_path / "texts")).files["test"][-1], "a") as file:
        file.write("x")  # no window reaches so far
    with pytest.raises(ProbeError, match="begun with data"):
        begun(tmp_path / "out", **settings)


def test_probes_over_training_are_of_the_checkpoints_that_are_there(tmp_path, capsys):
    task = make_task("copy", {"train_length": 4, "test_length": 8})
    data = encode(task.splits(n_train=40, n_validation=2, n_test=2).train, task.vocabulary)
    config = DecoderConfig(d_vocab=len(task.vocabulary), n_ctx=32, n_layers=1, d_model=8, n_heads=1)
    training = TrainingConfig(steps=2, batch_size=4, checkpoint_every=1)
    train(config, data, training, tmp_path / "run", keep_checkpoints=True)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, len(task.vocabulary), (12, 10)))
    words = [tmp_path / "run", "--tokens", tmp_path / "ids.npy", "--only", "over_training"]
    assert measure(tmp_path, *words) == 0
    assert measure(tmp_path, *words) == 0
    steps = pd.read_parquet(tmp_path / "out" / "rows.parquet")["step"]
    assert set(steps) == {0, 1, 2}
    place = tmp_path / "run" / "checkpoints" / "step-000000001"
    other = checkpoint.load(place)
    shutil.rmtree(place)
    other.head.weight.data[0, 0] += 1
    save(other, place)
    capsys.readouterr()
    assert measure(tmp_path, *words) == 2
    assert "begun with checkpoints.run.step-000000001" in capsys.readouterr().err


def test_the_order_of_models_counts(make_decoder, tmp_path, monkeypatch, capsys):
    for name, encoding in (("a", "none"), ("b", "t5")):
        save(make_decoder(encoding=encoding), tmp_path / name)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 19, (8, 6)))
    monkeypatch.chdir(tmp_path)
    for words, status in ((["a", "b"], 0), (["b", "a"], 2)):
        assert measure(tmp_path, *words, "--tokens", "ids.npy", "--only", "model_distance") == status
    assert "begun with order ['a', 'b'], and this command says ['b', 'a']" in capsys.readouterr().err
