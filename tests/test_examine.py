"""``probe examine``: models that others trained, from a folder to a report, without the hub."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from defined import undefined
from released import LLAMA, make
from tokenized import byte_level, gpt2, write_texts

from probe.attention import by_layer_encoding, census
from probe.cli import main
from probe.errors import ProbeError
from probe.measure import Case, TracedSequences
from probe.measure.run import Plan
from probe.models.anatomy import layer_encodings
from probe.models.pretrained import load_pretrained
from probe.position import position_table
from probe.study.examine import ExamineConfig, case_of, examine
from probe.study.places import find_checkpoints, locate

SMALL = ["--length", "32", "--sequences", "12", "--needles", "4"]


def made(rows):
    """The names of the measurements that were made."""
    return set(rows[~rows["metric"].isin(["skipped", "failed"])]["measurement"])


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A GPT-2 and a hybrid SmolLM3 with one tokenizer, a Qwen2 for the bridge with none, and texts."""
    folder = tmp_path_factory.mktemp("released")
    gpt2(folder / "gpt2")
    make(
        folder / "smollm3",
        "smollm3",
        {"vocab_size": 404, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2},
    )
    byte_level(folder / "smollm3")
    torch.manual_seed(0)
    from transformers import Qwen2Config, Qwen2ForCausalLM

    Qwen2ForCausalLM(Qwen2Config(**LLAMA)).save_pretrained(folder / "qwen2")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 19, (12, 20)))
    return folder, write_texts(folder / "texts")


@pytest.fixture(scope="module")
def examined(places, tmp_path_factory):
    folder, texts = places
    out = tmp_path_factory.mktemp("examined")
    assert (
        main(["examine", str(folder / "gpt2"), str(folder / "smollm3"), "--text", texts, "--folder", str(out), *SMALL])
        == 0
    )
    return out, pd.read_parquet(out / "rows.parquet")


@pytest.mark.slow
def test_a_hybrid_without_prompts_and_with_few_sequences_has_a_report_without_them(places, tmp_path):
    folder, _ = places
    np.save(tmp_path / "few.npy", np.random.default_rng(1).integers(0, 404, (8, 12)))
    assert main(
        ["examine", str(folder / "smollm3"), "--tokens", str(tmp_path / "few.npy"), "--length", "12", "--sequences",
         "8", "--folder", str(tmp_path / "out")]
    ) == 0  # fmt: skip
    rows = pd.read_parquet(tmp_path / "out" / "rows.parquet")
    measured = made(rows)
    assert {"fit", "use", "census", "by_layer_encoding"} <= measured
    assert not {"needle", "mechanism"} & measured  # the first wants prompts, the second 10 sequences
    assert "Layers that see position" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_a_folder_of_gpt2s_format_becomes_rows_and_a_report(examined, places):
    out, rows = examined
    for name in ("gpt2", "smollm3"):
        found = made(rows[rows["model"] == name])
        assert {
            "probe",
            "fit",
            "use",
            "geometry",
            "mechanism",
            "extrapolation",
            "templates",
            "census",
            "split",
        } <= found
        assert {"entropy", "loss_by_position", "shifted", "needle"} <= found
    assert {"table", "table_basis", "table_map"} <= made(rows[rows["model"] == "gpt2"])
    assert "table" not in made(rows[rows["model"] == "smollm3"])

    # The numbers are those of the functions.
    model = load_pretrained(places[0] / "gpt2")
    table = rows[(rows["model"] == "gpt2") & (rows["measurement"] == "table") & (rows["metric"] == "components_95")]
    wanted = position_table(model, seed=0).rows
    assert sorted(table["value"]) == sorted(wanted[wanted["metric"] == "components_95"]["value"])
    tokens = case_of("gpt2", model, places[0] / "gpt2", ExamineConfig(text=places[1], length=32, sequences=12)).tokens
    counted = rows[(rows["model"] == "gpt2") & (rows["measurement"] == "census") & (rows["control"] == "none")]
    assert counted["value"].tolist() == census(model, tokens)["value"].tolist()

    assert undefined(rows) == []
    page = (out / "report.html").read_text()
    assert "probe examine " in page and "--length 32 --sequences 12 --needles 4 --device cpu" in page
    for words in ("The table of positions", "Positions shifted", "Looking for a key", "Layers that see position"):
        assert words in page, words
    assert "position rotary in layers 0 1 2, none in layers 3" in page
    assert len(page) < 6_000_000


@pytest.mark.slow
def test_a_hybrid_is_split_by_what_its_layers_see(examined, places):
    rows = examined[1]
    assert layer_encodings(load_pretrained(places[0] / "smollm3")) == ["rotary", "rotary", "rotary", "none"]
    fit = rows[(rows["model"] == "smollm3") & (rows["measurement"] == "fit")]
    seen = fit.drop_duplicates("site").set_index("site")["layer_encoding"]
    assert seen["blocks.3.hook_resid_post"] == "none" and seen["blocks.2.attn.hook_z.1"] == "rotary"
    split = rows[rows["measurement"] == "by_layer_encoding"]
    assert set(split["model"]) == {"smollm3"}
    needle = rows[(rows["model"] == "smollm3") & (rows["measurement"] == "needle") & (rows["control"] == "none")]
    wanted = by_layer_encoding(needle, ["on_keys"]).set_index("layer_encoding")["value"]
    found = split[(split["of"] == "needle") & (split["metric"] == "on_keys")].set_index("layer_encoding")["value"]
    assert found.to_dict() == pytest.approx(wanted.to_dict())
    assert found["none - rotary"] == pytest.approx(found["none"] - found["rotary"])


@pytest.mark.slow
def test_a_finished_stage_is_not_done_again_and_other_work_is_refused(examined, places, capsys, told):
    out, rows = examined
    folder, texts = places
    before = {path: path.stat().st_mtime_ns for path in (out / "rows").glob("*.parquet")}
    (out / "rows" / "probe-gpt2.parquet").unlink()
    command = ["examine", str(folder / "gpt2"), str(folder / "smollm3"), "--text", texts, "--folder", str(out), *SMALL]
    assert main([*command, "--json"]) == 0
    printed, said = capsys.readouterr()
    assert said.splitlines()[:-1] == ["gpt2: probe"]  # then why models are not compared
    assert told.to_the_end() == (0, len(list((out / "rows").glob("*.parquet"))))
    found = pd.DataFrame([json.loads(line) for line in printed.splitlines()])
    assert list(found) == list(rows)
    np.testing.assert_array_equal(found["value"].astype(float), rows["value"])
    after = {path: path.stat().st_mtime_ns for path in (out / "rows").glob("*.parquet")}
    assert {path.name for path in before if before[path] != after[path]} == {"probe-gpt2.parquet"}
    pd.testing.assert_frame_equal(pd.read_parquet(out / "rows.parquet"), rows)
    assert main([*command, "--seed", "1"]) == 2
    assert "holds other work: it was begun with seed 0, and this command says 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_of_transformers_is_examined_on_token_ids(places, tmp_path, capsys):
    folder, _ = places
    tokens = ["--tokens", str(folder / "tokens.npy")]
    out = tmp_path / "out"
    assert main(["examine", str(folder / "qwen2"), *tokens, *SMALL, "--no-ablate", "--folder", str(out)]) == 0
    rows = pd.read_parquet(out / "rows.parquet")
    assert {"probe", "fit", "use", "census", "templates", "loss_by_position"} <= set(rows["measurement"])
    assert not {"needle", "shifted", "table"} & made(rows)
    assert {"none", "untrained"} <= set(rows[rows["measurement"] == "fit"]["control"])
    assert "Qwen2ForCausalLM of transformers" in (out / "report.html").read_text()
    capsys.readouterr()


def test_bad_input_is_one_clear_line(places, tmp_path, capsys):
    folder, texts = places
    np.save(tmp_path / "large.npy", np.full((12, 20), 19))
    np.save(tmp_path / "few.npy", np.zeros((3, 20), dtype=int))
    one = {"qwen2": folder / "qwen2"}
    for places_of, settings, message in [
        (
            one,
            {"text": texts},
            "texts need a folder with the model's tokenizer, a model of bytes, or a file of token ids",
        ),
        (one, {"tokens": str(tmp_path / "large.npy")}, r"ids must be in 0…18, those of .*qwen2, got 19…19"),
        (one, {"tokens": str(tmp_path / "few.npy")}, "at least 8 sequences of 64 tokens are needed, got 3"),
        (
            {"gpt2": folder / "gpt2"},
            {"text": texts, "length": 260},
            "sequences must have at most 256 tokens, got 260",
        ),
        ({"a/b": folder / "gpt2"}, {}, "without '/' was wanted, got 'a/b'"),
    ]:
        with pytest.raises(ProbeError, match=message):
            examine(places_of, tmp_path / "out", ExamineConfig(**settings))
        assert not (tmp_path / "out" / "rows").exists()
    with pytest.raises(ProbeError, match="length must be an integer of at least 8, got 4"):
        ExamineConfig(length=4)
    assert main(["examine", f"two={folder / 'gpt2'},{folder / 'gpt2'}", "--folder", str(tmp_path / "o")]) == 2
    assert "two: one model was wanted, got 2 seeds" in capsys.readouterr().err


def test_places_on_the_command_line_may_be_names_on_the_hub(places, monkeypatch):
    folder, _ = places
    asked = []

    def find_folder(name, revision):
        asked.append((name, revision))
        return folder / "gpt2"

    monkeypatch.setattr("probe.study.places.find_folder", find_folder)
    found, study = find_checkpoints(["own=owner/model@step1000,llama_nope:owner/nope", str(folder / "smollm3")])
    assert asked == [("owner/model", "step1000"), ("owner/nope", None)] and study is None
    assert [place.family for place in found["own"]] == [None, "llama_nope"]
    assert [place.folder for place in found["own"]] == [folder / "gpt2"] * 2
    assert found["smollm3"] == [locate(folder / "smollm3")]
    assert locate("owner/model").said == "owner/model"


def test_the_family_that_a_config_does_not_tell_is_said(tmp_path):
    make(tmp_path / "TinyLlama-NoPE", "llama")
    with pytest.raises(ProbeError, match="'model_type' is llama, whose positions are rotary, and its name says NoPE"):
        locate(tmp_path / "TinyLlama-NoPE").load()
    nope, rotary = (locate(f"{family}:{tmp_path / 'TinyLlama-NoPE'}").load() for family in ("llama_nope", "llama"))
    assert (nope.config.encoding, rotary.config.encoding) == ("none", "rotary")


def test_texts_are_each_models_own_tokens(places):
    from transformers import AutoTokenizer

    folder, texts = places
    config = ExamineConfig(text=texts, length=40, sequences=10)
    tokens = case_of("gpt2", load_pretrained(folder / "gpt2"), folder / "gpt2", config).tokens
    assert tokens.shape == (10, 40)
    theirs = AutoTokenizer.from_pretrained(folder / "gpt2")
    assert (tokens[:, 0] == theirs.bos_token_id).all()
    written = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(texts).iterdir()))
    for row in tokens:
        assert theirs.decode(row[2:-1]) in written  # the first and last may be parts of a character


def test_settings_are_kept(examined):
    kept = json.loads((examined[0] / "examine.json").read_text())
    assert kept["options"]["needle"] == {"n": 4} and set(kept["models"]) == {"gpt2", "smollm3"}


def test_what_cannot_be_compared_is_said(make_decoder, random_tokens):
    def planned(*pairs):
        cases = [Case(str(i), [model], TracedSequences(tokens)) for i, (model, tokens) in enumerate(pairs)]
        plan = Plan.make(cases, ["model_distance"])
        return plan.between, [missing.reason for missing in plan.missing]

    one, two = make_decoder(), make_decoder(encoding="rotary", seed=1)
    tokens = random_tokens()
    assert planned((one, tokens), (two, tokens)) == (["model_distance"], [])
    assert planned((one, tokens), (two, tokens + 1)) == ([], ["it needs models with the same tokens"])
    deeper = make_decoder(n_layers=3)
    assert planned((one, tokens), (deeper, tokens)) == ([], ["it needs models with equal numbers of layers and heads"])
    assert planned((one, tokens)) == ([], ["it needs at least 2 models, got 1"])


def test_census_of_a_released_model_is_of_its_own_words(places, capsys):
    """And not of the default task's ids, which mean something else in its vocabulary; every row says of what data."""
    folder, texts = places
    size = ["--trace-length", "16", "--trace-sequences", "8"]
    assert main(["census", str(folder / "gpt2"), "--text", texts, *size, "--json", "--device", "cpu"]) == 0
    rows = pd.DataFrame([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert set(rows["data"]) == {f"texts of {texts}"}
    model = load_pretrained(folder / "gpt2", device="cpu")
    tokens = case_of("gpt2", model, folder / "gpt2", ExamineConfig(text=texts, length=16, sequences=8)).tokens
    wanted = census(model, tokens)
    assert rows["value"].to_numpy() == pytest.approx(wanted["value"].to_numpy(), rel=1e-9, nan_ok=True)
    # A released model without its tokenizer: there is nothing that its ids could be made of.
    assert main(["census", str(folder / "qwen2"), *size]) == 2
    assert "qwen2 knows" in capsys.readouterr().err
