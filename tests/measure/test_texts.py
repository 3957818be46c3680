"""Models of text: `probe measure` and the commands of their own say the same, and claim nothing that nobody knows."""

import numpy as np
import pandas as pd
import pytest
from tokenized import gpt2, write_texts

from probe.cli import main
from probe.measure import Case, TracedSequences, measure_models
from probe.models.anatomy import n_ctx_of
from probe.models.checkpoint import save
from probe.study.places import find_checkpoints, load_all
from probe.study.texts import text_task_of
from probe.tasks import make_task
from probe.tasks.passkey import Passkey

D_VOCAB = len(make_task("passkey").vocabulary)
FEW = ["--n-texts", "3", "--n-prompts", "1", "--device", "cpu"]


@pytest.fixture
def folder(make_decoder, tmp_path, monkeypatch):
    """A model of bytes, one of these with a last position, one of transformers, and texts, in the working directory."""
    save(make_decoder(d_vocab=D_VOCAB, n_layers=1), tmp_path / "bytes")
    save(make_decoder(d_vocab=D_VOCAB, n_layers=1, encoding="learned", n_ctx=128), tmp_path / "learned")
    gpt2(tmp_path / "released", n_positions=128)
    write_texts(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options", "contexts"),
    [
        ("bytes", ["--train-length", "90"], {90, 180, 360, 720}),
        ("bytes", ["--contexts", "16,40"], {16, 40}),
        ("learned", [], {128}),
        ("released", ["--contexts", "64,128"], {64, 128}),
    ],
)
def test_measure_and_perplexity_agree(name, options, contexts, folder):
    words = [name, "--text", "texts", *FEW, *options]
    assert main(["measure", *words, "--only", "perplexity", "--trace-length", "16", "--folder", "m"]) == 0
    assert main(["perplexity", *words, "--folder", "p"]) == 0
    pd.testing.assert_frame_equal(*(pd.read_parquet(f"{at}/rows/perplexity-{name}.parquet") for at in "mp"))
    assert set(pd.read_parquet("m/rows.parquet")["context"]) == contexts


@pytest.mark.parametrize(
    ("name", "study", "given", "wanted"),
    [
        ("bytes", None, {}, (256, False)),
        ("learned", None, {}, (128, False)),
        ("bytes", None, {"train_length": 90}, (90, True)),
        ("bytes", {"train_length": 100, "test_length": 120}, {}, (100, True)),
        ("bytes", {"n_keys": 1}, {}, (Passkey.train_length, True)),
        ("bytes", {"train_length": 100, "test_length": 120}, {"train_length": 90}, (90, True)),
        ("released", None, {}, (128, True)),
    ],
)
def test_the_trained_length_is_what_something_says(name, study, given, wanted, folder):
    places, _ = find_checkpoints([name])
    models = load_all(places, "cpu")
    task, trained = text_task_of(models, {name: places[name][0].folder}, study, text="texts", **given)
    assert (task.train_length, trained) == wanted
    assert name != "released" or n_ctx_of(models[name][0]) == 128


def test_one_text_has_no_interval(make_decoder, random_tokens, tmp_path):
    for batch in (1, 2):
        case = Case("a", [make_decoder()], TracedSequences(random_tokens(batch=batch)))
        rows = measure_models([case], tmp_path / str(batch), ["loss_by_position"])
        assert rows["value"].notna().all()
        assert (rows["low"].isna() & rows["high"].isna()).all() == (batch == 1)


def test_contexts_need_texts(make_decoder, tmp_path, monkeypatch, capsys):
    save(make_decoder(), tmp_path / "a")
    np.save(tmp_path / "ids.npy", np.zeros((4, 8), dtype=int))
    monkeypatch.chdir(tmp_path)
    assert main(["measure", "a", "--tokens", "ids.npy", "--contexts", "4", "--device", "cpu"]) == 2
    assert "--contexts needs models of text" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["measure", "compare", "fit", "census", "examine"])
def test_tokens_and_text_together_are_refused(command, folder, capsys):
    np.save("ids.npy", np.zeros((8, 8), dtype=int))
    out = [] if command == "census" else ["--folder", "out"]
    assert main([command, "bytes", "--tokens", "ids.npy", "--text", "texts", "--device", "cpu", *out]) == 2
    error = capsys.readouterr().err
    assert "got both (ids.npy and texts)" in error and error.count("\n") == 1
