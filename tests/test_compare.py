"""``probe compare`` and ``probe census``: decoders that exist already, on the command line."""

import json
import re
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from defined import undefined

from probe.attention import census, compare_models, compare_templates, split_scores
from probe.cli import main
from probe.limits import limits
from probe.models import checkpoint
from probe.models.decoder import Decoder, DecoderConfig
from probe.position import probe_positions
from probe.study.command import examine_command
from probe.study.examine import ExamineConfig
from probe.study.places import find_checkpoints
from probe.tracing import PATTERN, SCORES, trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three checkpoints, two of them seeds of one model, and tokens."""
    folder = tmp_path_factory.mktemp("compare")
    for name, encoding, seed in (("a", "none", 0), ("b", "none", 1), ("c", "t5", 2)):
        config = DecoderConfig(d_vocab=11, n_ctx=16, n_layers=2, d_model=16, n_heads=2, encoding=encoding)
        checkpoint.save(Decoder(config, seed=seed), folder / name)
    tokens = np.random.default_rng(0).integers(0, 11, (12, 10))
    np.save(folder / "tokens.npy", tokens)
    return folder


def tokens_of(folder):
    return torch.as_tensor(np.load(folder / "tokens.npy"))


def test_compare_writes_rows_and_a_page(folder, tmp_path, capsys, told):
    models = [f"nope={folder / 'a'},{folder / 'b'}", f"t5={folder / 'c'}"]
    out = tmp_path / "out"
    assert main(["compare", *models, "--tokens", str(folder / "tokens.npy"), "--folder", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    assert told.to_the_end() == (0, 2 * 6 + 2)  # stages of each model, and of the pair
    rows = pd.read_parquet(out / "rows.parquet")
    assert {"templates", "census", "split", "entropy", "model_distance", "trained_t5"} <= set(rows["measurement"])

    # The same from Python.
    a, b, c = (trace(checkpoint.load(folder / name), tokens_of(folder), [PATTERN, SCORES]) for name in "abc")
    wanted = compare_models({"nope": [a, b], "t5": [c]})
    found = rows[(rows["measurement"] == "model_distance") & (rows["control"] == "none")]
    found = found[found["aggregate"] == "minimum"]
    np.testing.assert_array_equal(found["value"], wanted["value"])
    shares = rows[(rows["measurement"] == "split") & (rows["control"] == "none") & (rows["model"] == "t5")]
    np.testing.assert_array_equal(shares["value"], split_scores(c).rows["value"])

    assert undefined(rows) == []
    page = (out / "report.html").read_text()
    assert f"probe compare nope={folder / 'a'}" in page and f"--folder {out}</code>" in page
    for words in ("Attention beside its templates", "Scores split", "Census of heads", "Models compared"):
        assert words in page
    assert len(page) < 5_000_000


def test_long_sequences_are_streamed(folder, tmp_path, capsys, told):
    models = [f"nope={folder / 'a'}", f"t5={folder / 'c'}"]
    out = tmp_path / "out"
    with limits(dense_numbers=1):
        assert main(["compare", *models, "--tokens", str(folder / "tokens.npy"), "--folder", str(out), "--json"]) == 0
    printed, said = capsys.readouterr()
    assert "models not compared with each other" in said
    assert told.to_the_end() == (0, 2 * 5)
    rows = pd.read_parquet(out / "rows.parquet")
    assert_same_rows(printed, rows)
    skipped = rows[rows["metric"] == "skipped"]
    assert set(skipped["measurement"]) == {"census", "model_distance", "trained_t5"}
    assert skipped["reason"].str.contains("whole attention patterns, which are too large at this length").all()
    rows = rows[rows["metric"] != "skipped"]
    assert set(rows["measurement"]) == {"templates", "split", "entropy"}
    page = (out / "report.html").read_text()
    assert "Scores split" in page and "Models compared" not in page
    # The same as from whole patterns.
    traced = trace(checkpoint.load(folder / "a"), tokens_of(folder), [PATTERN, SCORES])
    keys = ["layer", "head", "template"]
    found = rows[(rows["measurement"] == "templates") & (rows["model"] == "nope") & (rows["control"] == "none")]
    both = found.merge(compare_templates(traced, list(found["template"].unique())), on=keys, validate="1:1")
    np.testing.assert_allclose(both["value_x"], both["value_y"], atol=1e-6)


def assert_same_rows(printed, rows):
    """JSON lines and nothing else, one a row, with its numbers."""
    found = pd.DataFrame([json.loads(line) for line in printed.splitlines()])
    assert list(found) == list(rows) and len(found) == len(rows)
    np.testing.assert_array_equal(found["value"], rows["value"])


def test_fit_prints_r2_beside_its_controls(folder, tmp_path, capsys, told):
    models = [f"nope={folder / 'a'},{folder / 'b'}", f"t5={folder / 'c'}"]
    out = tmp_path / "out"
    arguments = ["--tokens", str(folder / "tokens.npy"), "--folder", str(out), "--fitted-length", "3"]
    assert main(["fit", *models, *arguments, "--targets", "position,fourier"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(out / "report.html")
    assert printed[0].split() == ["r2", "less", "untrained", "less", "embedding", "less", "shuffled", "less", "random"]
    rows = pd.read_parquet(out / "rows.parquet")
    of_c = rows[(rows["model"] == "t5") & (rows["measurement"] == "fit") & (rows["control"] == "none")]
    wanted = probe_positions(
        checkpoint.load(folder / "c"), tokens_of(folder), targets=("position", "fourier"), controls=()
    )
    np.testing.assert_allclose(of_c["value"], wanted["value"])
    assert set(rows["measurement"]) == {"fit", "extrapolation"}
    assert told.to_the_end() == (0, 2 * 2)
    one = ["fit", f"t5={folder / 'c'}", *arguments, "--targets", "position", "--json"]
    assert main(one) == 2
    assert "holds other work: it was begun with options.fit.targets" in capsys.readouterr().err
    one[one.index(str(out))] = str(tmp_path / "one")
    assert main(one) == 0
    assert_same_rows(capsys.readouterr().out, pd.read_parquet(tmp_path / "one" / "rows.parquet"))
    # A model, its untrained twin, a projection; and these again beyond the fitted length.
    assert [3 * done for done, _ in told] == pytest.approx([0, 0, 1, 2, 3, 3, 4, 5, 6])
    arguments[arguments.index(str(out))] = str(tmp_path / "two")
    assert main(["fit", *models, *arguments, "--targets", "place"]) == 2
    assert "unknown target 'place'" in capsys.readouterr().err


def test_census_prints_a_line_a_head(folder, capsys, told):
    arguments = ["census", str(folder / "a"), "--tokens", str(folder / "tokens.npy")]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert told.to_the_end() == (0, 1)
    assert len(lines) == 1 + 4 and lines[0].split()[:4] == ["model", "replica", "layer", "head"]
    assert main([*arguments, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = census(checkpoint.load(folder / "a"), tokens_of(folder))
    assert [row["value"] for row in rows] == pytest.approx(wanted["value"].tolist(), rel=1e-9)
    assert {row["model"] for row in rows} == {"a"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}/a", "{0}/a"], "two models are called 'a'"),
        (["{0}/nowhere"], "nowhere: no such folder"),
        (["{0}/a", "--tokens", "{0}/a/config.json"], "token ids in numpy's format were wanted"),
        (
            ["{0}/a", "--tokens", "{0}/floats.npy"],
            r"integers of shape \(sequence, pos\) were wanted, got float64 \(2,\)",
        ),
        (["{0}/a", "--tokens", "{0}/large.npy"], r"token ids must lie in 0…10"),
        (["{0}/a", "--tokens", "{0}/missing.npy"], "no such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(folder, arguments, message, capsys, tmp_path):
    np.save(folder / "floats.npy", np.zeros(2))
    np.save(folder / "large.npy", np.full((4, 5), 11))
    arguments = [a.format(folder) for a in arguments]
    for command in (["compare", "--folder", str(tmp_path / "out")], ["census"]):
        assert main([*command, *arguments]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_released_model_is_compared_as_ours_are(tmp_path, folder, capsys):
    """A folder in GPT-2's format, and one in GPT-NeoX's, whose blocks have no stream between attention and MLP."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    sizes = {"vocab_size": 11, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    GPTNeoXForCausalLM(
        GPTNeoXConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, rotary_pct=0.5)
    ).save_pretrained(tmp_path / "neox")
    models = [f"gpt2={tmp_path / 'gpt2'}", f"neox={tmp_path / 'neox'}", "--tokens", str(folder / "tokens.npy")]
    assert main(["compare", *models, "--folder", str(tmp_path / "compared")]) == 0
    rows = pd.read_parquet(tmp_path / "compared" / "rows.parquet")
    assert set(rows["model"].dropna()) == {"gpt2", "neox"} and "model_distance" in set(rows["measurement"])
    assert main(["fit", *models, "--folder", str(tmp_path / "fitted")]) == 0
    fitted = pd.read_parquet(tmp_path / "fitted" / "rows.parquet")
    sites = fitted[fitted["model"] == "neox"]["site"]
    assert not sites.str.contains("resid_mid").any() and sites.str.contains("resid_post").any()


@pytest.mark.parametrize("name", ["lr=0.1,seed=1", "a,b", "x=y"])
def test_a_path_may_hold_the_signs_of_names(folder, tmp_path, name, monkeypatch):
    """As hydra writes them; a name is read from what is no path."""
    shutil.copytree(folder / "a", tmp_path / name)
    found, _ = find_checkpoints([str(tmp_path / name)])
    assert {model: [place.folder for place in places] for model, places in found.items()} == {name: [tmp_path / name]}
    found, _ = find_checkpoints([f"mine={tmp_path / name},{folder / 'b'},{tmp_path / name}"])
    assert [place.folder for place in found["mine"]] == [tmp_path / name, folder / "b", tmp_path / name]
    monkeypatch.chdir(tmp_path / name)
    assert [*find_checkpoints(["."])[0]] == [name]  # not a name without a letter
    command = examine_command({name: str(tmp_path / name)}, ExamineConfig(), "cpu")
    assert [*find_checkpoints(shlex.split(command)[2:3])[0]] == [name]


def test_a_model_is_not_looked_at_on_the_ids_of_another_vocabulary(folder, capsys):
    """The default task has other tokens than this model of 11: its ids would be measured without complaint."""
    for command in ("census", "fit", "compare"):
        assert main([command, str(folder / "a"), "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert "a knows 11 tokens, and the task 'scan' has" in error and "--tokens FILE" in error
        assert error.count("\n") == 1
