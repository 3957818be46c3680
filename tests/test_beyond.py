"""Models of text beyond their trained length: in a study, and from checkpoints on the command line."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from defined import undefined

from probe.cli import main
from probe.errors import ProbeError
from probe.extrapolation import ScaleTraining, perplexity, scaled
from probe.models import checkpoint
from probe.models.decoder import Decoder, DecoderConfig
from probe.study import StudyConfig, run_study
from probe.study.beyond import BEYOND_STAGES, Beyond, beyond_stages, fit_heads, fit_uniform, scale_of, stretches
from probe.tasks import make_task
from probe.training import TrainingConfig

TASK = {"train_length": 90, "test_length": 120}
SMALL = StudyConfig(
    task="passkey",
    task_options=TASK,
    encodings=("none", "rotary"),
    seeds={},
    n_train=300,
    n_validation=20,
    n_test=20,
    model={"n_layers": 2, "d_model": 32, "n_heads": 2},
    training=TrainingConfig(steps=30, batch_size=8, learning_rate=3e-3),
    trace_sequences=16,
    trace_length=84,
    verify_lengths=(16,),
    extensions=(2, 3),
    scale_steps=5,
)
OF_NONE = {("none", None)} | {(v, s) for v in ("uniform", "head") for s in (2, 3)} | {("log_length", None)}
OF_ROTARY = (
    {("none", None), ("dropped", None)}
    | {(v, s) for v in ("uniform", "linear", "ntk", "yarn", "dropped_uniform") for s in (2, 3)}
)  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beyond") / "run"
    run_study(SMALL, folder, device="cpu", jobs=1)
    return folder


@pytest.fixture(scope="session")
def rows(folder):
    return pd.read_parquet(folder / "rows.parquet")


@pytest.fixture
def beyond():
    return Beyond(make_task("passkey", TASK), extensions=(2, 3), n_texts=4, n_prompts=1, n_fitted=4)


def of(rows, measurement, encoding):
    return rows[(rows["measurement"] == measurement) & (rows["encoding"] == encoding)]


def made(rows):
    pairs = rows[["variant", "extension"]].drop_duplicates()
    return {(v, None if math.isnan(s) else int(s)) for v, s in pairs.itertuples(index=False)}


def test_every_number_is_defined(rows):
    assert undefined(rows) == []


@pytest.mark.parametrize("measurement", ["perplexity", "loss_by_position", "passkey"])
def test_every_variant_is_measured(rows, measurement):
    assert made(of(rows, measurement, "none")) == OF_NONE
    assert made(of(rows, measurement, "rotary")) == OF_ROTARY
    assert of(rows, measurement, "none")[["value", "low", "high"]].notna().all().all()


def test_the_rows_are_what_the_models_on_disk_make(folder, rows):
    """Nothing in between is rounded or mixed up: the numbers come again from checkpoint, scales and task."""
    beyond = Beyond(make_task("passkey", TASK), extensions=(2, 3))
    model = checkpoint.load(folder / "models" / "none" / "final")
    scales = of(rows, "head_scale", "none")
    kept = scales[(scales["variant"] == "head") & (scales["extension"] == 3)]
    texts = beyond.held_out
    found = perplexity(
        scaled(model, scale_of(kept)), texts, (90, 180, 270), prefix=(1, 2), score_from=texts.shape[1] // 2
    )
    there = of(rows, "perplexity", "none")
    there = there[(there["variant"] == "head") & (there["extension"] == 3)]
    changes, there = (there[(there["metric"] == "loss_change") == is_change] for is_change in (True, False))
    plain = of(rows, "perplexity", "none").query("variant == 'none' and metric == 'loss'")
    losses = found[found["metric"] == "loss"]["value"]
    np.testing.assert_allclose(changes["value"], losses.to_numpy() - plain["value"].to_numpy(), atol=1e-12)
    np.testing.assert_array_equal(there["value"], found["value"])
    assert texts.shape[1] == 268 and (there["tokens"] == 134).all()


def test_scales_obey_the_limit_and_have_a_law(rows):
    scales = of(rows, "head_scale", "none")
    assert made(scales) == OF_NONE - {("none", None), ("log_length", None)}
    assert len(scales) == 4 * 4 and (scales["value"] >= 1).all()
    uniform = scales[scales["variant"] == "uniform"].groupby("extension")["value"]
    assert (uniform.nunique() == 1).all()
    law = of(rows, "scale_law", "none")
    assert set(law["metric"]) == {"slope", "r2"} and set(law["variant"]) == {"uniform", "head"}


def test_entropy_is_that_of_heads_before_and_after(rows):
    entropy = of(rows, "scaled_entropy", "none")
    assert made(entropy) == {("none", None), ("log_length", None), ("uniform", 3), ("head", 3)}
    assert (entropy["value"] <= np.log(entropy["query"] + 1) + 1e-4).all() and (entropy["value"] >= 0).all()
    rise = of(rows, "entropy_rise", "none")
    assert len(rise) == 2 * 4 * 2
    assert of(rows, "entropy_rise", "rotary").empty


def test_a_finished_study_does_nothing_again(folder, rows, monkeypatch):
    def refused(*args, **options):
        raise AssertionError("measured again")

    for name in ("train_scale", "sweep_scale", "context_losses", "passkey", "train"):
        monkeypatch.setattr(f"probe.study.beyond.{name}", refused)
    told = []
    again = run_study(SMALL, folder, device="cpu", jobs=1, on_progress=lambda *numbers: told.append(numbers))
    pd.testing.assert_frame_equal(again, rows)
    # All that was planned is there, before there was any model to ask, and the report alone is left.
    there = [*(folder / "rows").glob("*.parquet"), *(folder / "models").glob("*/final")]
    planned = len(there) - 1  # the model whose encoding is dropped belongs to a stage
    assert set(told) == {(planned, planned + 1), (planned + 1, planned + 1)}


def test_a_dropped_encoding_is_gone_and_the_rest_went_on(folder):
    dropped = checkpoint.load(folder / "models" / "rotary-dropped" / "final")
    assert dropped.config.encoding == "none"
    rotary = checkpoint.load(folder / "models" / "rotary" / "final")
    moved = (dropped.head.weight - rotary.head.weight).abs().mean()
    assert 0 < moved < 0.1 * rotary.head.weight.abs().mean()
    run = json.loads((folder / "models" / "rotary-dropped" / "run.json").read_text())
    assert run["training"]["steps"] == 3 and "initial" in run


def test_the_report_shows_it(folder):
    page = (folder / "report.html").read_text()
    assert "Beyond the trained length" in page and "Wang et al. 2024" in page
    assert (folder / "figures" / "perplexity.html").exists() and (folder / "figures" / "passkey.html").exists()


def test_stretches_are_the_encodings_own(beyond):
    task = beyond.task
    config = DecoderConfig(d_vocab=len(task.vocabulary), n_ctx=999, n_layers=1, d_model=8, n_heads=1, encoding="rotary")
    found = {(v.name, v.extension): v.model.config.encoding_options for v in stretches(Decoder(config), beyond)}
    assert found["yarn", 3] == {"scaling": "yarn", "factor": 3.0, "trained_length": 90}
    assert set(found) == {(name, s) for name in ("linear", "ntk", "yarn") for s in (2, 3)}


def test_a_learned_table_ends_where_it_ends(beyond):
    def stages(n_ctx):
        config = DecoderConfig(
            d_vocab=len(beyond.task.vocabulary), n_ctx=n_ctx, n_layers=1, d_model=8, n_heads=2, encoding="learned"
        )
        kept = {}
        return beyond_stages(Decoder(config), beyond, lambda name, measure: kept.setdefault(name, measure()))

    assert stages(n_ctx=100) == {}
    found = stages(n_ctx=180)["perplexity"]()
    assert set(found["context"]) == {90, 180}


def test_ways_to_fit_heads(beyond):
    decoder = Decoder(DecoderConfig(d_vocab=260, n_ctx=90, n_layers=1, d_model=8, n_heads=2))
    uniform = fit_uniform(decoder, dataclasses.replace(beyond, extensions=(2,)))
    fits = ("head", "head_free", "head_from_one", "head_free_from_one")
    training = ScaleTraining(steps=3, warmup=0, learning_rate=0.5)
    settings = dataclasses.replace(beyond, extensions=(2,), fits=fits, scale=training)
    found = fit_heads(decoder, settings, uniform.assign(value=1.3)).groupby("variant")["value"]
    assert set(found.groups) == set(fits)
    assert (found.min()[["head", "head_from_one"]] >= 1).all()
    with pytest.raises(ProbeError, match="unknown way to fit the scales of heads 'tail'; known: head, head_free"):
        dataclasses.replace(beyond, fits=("tail",))


def test_commands(folder, tmp_path, capsys, told):
    few = ["--n-texts", "4", "--n-prompts", "1", "--device", "cpu"]
    model = f"nope={folder}/models/none"
    options = ["--train-length", "90", *few]
    assert main(["perplexity", str(folder), "--folder", str(tmp_path / "p"), *few]) == 0
    table, report = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert report == str(tmp_path / "p" / "report.html")
    assert [int(c) for c in table.splitlines()[0].split()[1:]] == [90, 180, 360, 720]
    assert "before each of them stands: &lt;bos&gt;" in Path(report).read_text()
    assert pd.read_parquet(tmp_path / "p" / "rows.parquet")["data"].str.startswith("texts of ").all()
    assert told.to_the_end() == (0, 2 * 2)
    arguments = ["--lengths", "128,200", "--depths", "0,1", "--folder", str(tmp_path / "k"), "--json"]
    assert main(["passkey", model, *arguments, *options]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told.to_the_end() == (0, 1)
    assert {(r["length"], r["depth"]) for r in said} == {(n, d) for n in (128, 200) for d in (0, 1, None)}
    scale = ["--extensions", "2", "--steps", "2", "--ablation", "--folder", str(tmp_path / "s")]
    assert main(["scale", model, *scale, *options]) == 0
    assert told.to_the_end() == (0, len(BEYOND_STAGES))
    rows = pd.read_parquet(tmp_path / "s" / "rows.parquet")
    assert {"head", "head_free", "head_from_one", "head_free_from_one", "uniform"} <= set(rows["variant"])
    assert set(rows["measurement"]) == set(BEYOND_STAGES)
    kept = rows[(rows["measurement"] == "head_scale") & (rows["variant"] == "head")]
    folded = checkpoint.load(tmp_path / "s" / "models" / "nope-head-2x")
    expected = scaled(checkpoint.load(folder / "models" / "none" / "final"), scale_of(kept))
    tokens = torch.arange(50)[None]
    assert torch.equal(folded(tokens), expected(tokens))
    assert "<html" in (tmp_path / "s" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["passkey", "{model}", "--lengths", "40"],
            "a passkey prompt must be an integer of at least 84, got 40",
        ),
        (["passkey", "{model}", "--n-keys", "99"], "n_keys must be at most 24"),
        (["perplexity", "{model}", "--contexts", "2"], "contexts must be of at least 6 tokens, got 2"),
        (["perplexity", "{model}", "--text", "{empty}"], "at least 3 files that are not empty were wanted, got 0"),
        (["scale", "{model}", "--steps", "0"], "steps must be an integer of at least 1, got 0"),
        (["scale", "{model}", "--fits", "tail"], "unknown way to fit the scales of heads 'tail'"),
        (["scale", "{other}"], "a model of 260 tokens, bytes, was wanted"),
    ],
)
def test_wrong_input_is_one_line(folder, tmp_path, capsys, arguments, said):
    (tmp_path / "empty").mkdir()
    checkpoint.save(Decoder(DecoderConfig(d_vocab=9, n_ctx=9, n_layers=1, d_model=8, n_heads=1)), tmp_path / "other")
    places = {"model": folder / "models" / "none", "empty": tmp_path / "empty", "other": tmp_path / "other"}
    words = [word.format(**places) for word in arguments]
    assert main([*words, "--folder", str(tmp_path / "out"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_study_that_is_kept_shows_what_its_page_says():
    docs = Path(__file__).parent.parent / "docs"
    rows, page = pd.read_parquet(docs / "extrapolation" / "rows.parquet"), (docs / "extrapolation.md").read_text()
    perplexities = of(rows, "perplexity", "none").set_index(["variant", "extension", "context", "metric"]).sort_index()
    passkeys = of(rows, "passkey", "none")
    passkeys = passkeys[passkeys["depth"].isna() & (passkeys["metric"] == "exact_match")]
    passkeys = passkeys.set_index(["variant", "extension", "length"]).sort_index()
    for extension in (2.0, 4.0, 8.0):
        where = ("head", extension, 256 * extension)
        # The paper's claim: a scale for every head is better than none, beyond what texts differ in.
        assert perplexities.loc[(*where, "loss_change"), "high"] < 0
        head = f"{perplexities.loc[(*where, 'perplexity'), 'value']:#.3g}".rstrip(".")
        assert f"{head}, {passkeys.loc[where, 'value']:.2f}".replace(", 0.", ", .") in page
    assert passkeys.loc[("uniform", 2.0, 512), "low"] > passkeys.loc[("none", np.nan, 512), "high"]
