"""Every measurement asked for alone: its rows keep to the schema, and there is a page that shows something."""

import numpy as np
import pandas as pd
import pytest
from small_study import untrained_study

from probe.cli import main
from probe.measure import MEASUREMENTS
from probe.models.checkpoint import load, save
from probe.models.decoder import Decoder, DecoderConfig
from probe.rows import check_rows
from probe.runs import RunFolder
from probe.study import StudyData
from probe.tasks import make_task
from probe.training import TrainingConfig, encode, exact_match, predict, train

TASK = {"task": "copy", "task_options": {"train_length": 4, "test_length": 8}}
FEW = ("--train-length", 96, "--contexts", "96,128", "--n-texts", 4, "--n-prompts", 1)
TEXTS = ("needle", "perplexity", "passkey")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of three encodings, two trainings of NoPE among them; nothing is trained."""
    folder = tmp_path_factory.mktemp("alone") / "study"
    model = {"n_layers": 1, "d_model": 8, "n_heads": 2}
    return folder, untrained_study(folder, **TASK, encodings=("none", "t5", "learned"), model=model)


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory):
    """A model of bytes, and texts."""
    folder = tmp_path_factory.mktemp("bytes")
    d_vocab = len(make_task("passkey").vocabulary)
    save(Decoder(DecoderConfig(d_vocab=d_vocab, n_ctx=2048, n_layers=1, d_model=8, n_heads=1), seed=0), folder / "b")
    (folder / "texts").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        (folder / "texts" / f"{i}.txt").write_text(" ".join(rng.choice(["ab", "cde", "fgh"], 3000)))
    return folder


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory):
    """A training that kept its checkpoints."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    task = make_task("copy", {"train_length": 4, "test_length": 8})
    data = encode(task.splits(n_train=40, n_validation=2, n_test=2).train, task.vocabulary)
    model = DecoderConfig(d_vocab=len(task.vocabulary), n_ctx=32, n_layers=1, d_model=8, n_heads=1)
    train(model, data, TrainingConfig(steps=2, batch_size=4, checkpoint_every=1), folder, keep_checkpoints=True)
    np.save(folder.parent / "ids.npy", np.random.default_rng(0).integers(0, len(task.vocabulary), (12, 10)))
    return folder


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_it_has_rows_and_a_page(name, study, of_bytes, kept_run, tmp_path, capsys):
    where = {
        **{each: [of_bytes / "b", "--text", of_bytes / "texts", "--trace-length", 16, *FEW] for each in TEXTS},
        "over_training": [kept_run, "--tokens", kept_run.parent / "ids.npy"],
    }.get(name, [study[0]])
    words = ["measure", *map(str, where), "--only", name, "--folder", str(tmp_path / "out"), "--device", "cpu"]
    assert main(words) == 0, capsys.readouterr().err
    rows = pd.read_parquet(tmp_path / "out" / "rows.parquet")
    check_rows(rows, ("measurement", "model", "encoding", "metric"))
    drawn = MEASUREMENTS[name].drawn
    assert rows.empty if drawn else name in set(rows["measurement"][rows["metric"] != "skipped"])
    assert len(list((tmp_path / "out" / "rows").glob("*.parquet"))) == (3 if drawn else 1) or not drawn
    page = (tmp_path / "out" / "report.html").read_text()
    assert "No figure shows these rows" not in page and '<section id="section-1"' in page


def test_of_two_trainings_rows_have_both_and_the_page_the_first(study, tmp_path):
    folder, config = study
    out = tmp_path / "out"
    assert main(["measure", str(folder), "--only", "accuracy", "--folder", str(out), "--device", "cpu"]) == 0
    rows = pd.read_parquet(out / "rows.parquet")
    assert "seed" not in rows
    overall = rows[rows["length"].isna() & (rows["model"] == "none") & (rows["split"] == "test")]
    assert overall["replica"].tolist() == [0, 1]
    data = StudyData.of(config)
    for replica, name in enumerate(("none", "none-1")):
        predictions = predict(load(folder / "models" / name / "final"), data.splits.test, data.task.vocabulary)
        wanted = exact_match(predictions).query("length.isna()")["value"].item()
        assert overall["value"].tolist()[replica] == wanted
    assert set(rows[rows["model"] == "t5"]["replica"]) == {0}


def test_a_measurement_that_draws_leaves_its_drawings_only(study, tmp_path):
    out = tmp_path / "out"
    assert main(["measure", str(study[0]), "--only", "maps", "--folder", str(out), "--device", "cpu"]) == 0
    assert set(RunFolder(out, "measure").rows("maps-none")["head"]) == {0, 1}
