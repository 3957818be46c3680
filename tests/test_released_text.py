"""A released model and its own tokenizer: a study of it, and the commands, with nothing trained."""

import json
import math

import pandas as pd
import pytest
import torch
from released import LLAMA, make
from tokenized import byte_level, gpt2, write_texts
from transformers import AutoConfig, AutoModelForCausalLM

from probe.cli import main
from probe.errors import ProbeError
from probe.extrapolation import ScaleTraining, passkey, perplexity, sweep_scale, train_scale
from probe.limits import limits
from probe.measure import MEASUREMENTS
from probe.models.pretrained import load_pretrained
from probe.study import StudyConfig, run_study, train_one
from probe.study.beyond import BEYOND_STAGES, Beyond
from probe.study.results import MEASURED
from probe.tasks import make_task
from probe.training import TrainingConfig, encode, predict

ROW_STAGES = [name for name in MEASURED if not (MEASUREMENTS[name].drawn or MEASUREMENTS[name].between)]
FEW = ["--n-texts", "4", "--n-prompts", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with texts, a GPT-2 of 256 positions and a Qwen2 (for the bridge) of the same tokens, and the former
    itself."""
    folder = tmp_path_factory.mktemp("released")
    write_texts(folder / "text")
    torch.manual_seed(0)
    shape = LLAMA | {"vocab_size": 400, "max_position_embeddings": 256, "num_attention_heads": 2, "hidden_size": 16}
    shape |= {"num_key_value_heads": 1, "initializer_range": 0.2}
    qwen = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **shape))
    qwen.save_pretrained(folder / "qwen2")
    return folder, gpt2(folder / "gpt2")


def options(folder, **more):
    return {"tokenizer": str(folder / "gpt2"), "text": str(folder / "text"), **more}


def study_of(folder, **changes):
    values = {
        "task": "passkey",
        "task_options": options(folder, train_length=64, test_length=80),
        "encodings": ("learned", "rotary"),
        "load": {"learned": str(folder / "gpt2"), "rotary": str(folder / "qwen2")},
        "seeds": {},
        "n_train": 4,
        "n_validation": 12,
        "n_test": 12,
        "model": {"n_layers": 2, "d_model": 16, "n_heads": 2},
        "training": TrainingConfig(steps=2, batch_size=4, learning_rate=1e-3),
        "trace_sequences": 12,
        "trace_length": 24,
        "verify_lengths": (16,),
        "extensions": (2,),
        "scale_steps": 3,
    }
    return StudyConfig(**(values | changes))


@pytest.fixture(scope="module")
def study(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    run_study(study_of(place[0]), folder, device="cpu", jobs=1)
    return folder


@torch.no_grad()
def own_loss(model, ids):
    """Hugging Face's loss on sequences, in nats a token: of all but the first."""
    return float(model(ids, labels=ids).loss)


def test_perplexity_is_hugging_faces_own(place):
    folder, model = place
    beyond = Beyond(make_task("passkey", options(folder, train_length=64, test_length=80)), extensions=(2,))
    vocabulary, texts = beyond.task.vocabulary, beyond.held_out
    assert texts.shape[1] == 127
    rows = perplexity(load_pretrained(folder / "gpt2", device="cpu"), texts, (128,), prefix=(vocabulary.bos,))
    ids = torch.cat((torch.full((len(texts), 1), 399), texts), dim=1)
    assert rows.set_index("metric")["value"]["loss"] == pytest.approx(own_loss(model, ids), rel=1e-5)
    # Without a token in front, the first of the text is not predicted.
    rows = perplexity(load_pretrained(folder / "gpt2", device="cpu"), texts, (127,))
    assert rows.set_index("metric")["value"]["loss"] == pytest.approx(own_loss(model, texts), rel=1e-5)


def test_a_study_of_it_trains_nothing_and_measures_everything(study):
    rows = pd.read_parquet(study / "rows.parquet")
    pairs = rows[rows["measurement"] == "model_distance"]
    assert {*pairs["model_a"], *pairs["model_b"]} == {"learned", "rotary"}
    of_learned = rows[rows["encoding"] == "learned"]
    assert set(of_learned["measurement"]) == {*ROW_STAGES, *BEYOND_STAGES}
    # Under a bridge there are no positions to shift; everything else there is.
    of_bridge = set(rows[rows["encoding"] == "rotary"]["measurement"])
    assert {*ROW_STAGES, *BEYOND_STAGES} - of_bridge == {"shifted"}
    assert set(of_learned[of_learned["measurement"] == "perplexity"]["context"]) == {64, 128}
    passkeys = of_learned[of_learned["measurement"] == "passkey"]
    assert set(passkeys["length"]) == {64, 128} and passkeys["value"].between(0, 1).all()
    assert "Beyond the trained length" in (study / "report.html").read_text()
    # Of models that a study trains itself, a copy without rotary positions is trained.
    assert not (study / "models").exists() and "dropped" not in set(rows["variant"])


def test_the_rows_are_hugging_faces_numbers(place, study):
    folder, model = place
    rows = pd.read_parquet(study / "rows.parquet")
    plain = rows[(rows["measurement"] == "perplexity") & (rows["encoding"] == "learned") & (rows["context"] == 128)]
    found = plain[plain["variant"] == "none"].set_index("metric")["value"]
    task = make_task("passkey", options(folder, train_length=64, test_length=80))
    texts = Beyond(task, extensions=(2,)).held_out
    ids = torch.cat((torch.full((len(texts), 1), 399), texts), dim=1)
    with torch.no_grad():
        log_p = model(ids).logits.double().log_softmax(-1)
    half = texts.shape[1] // 2
    loss = -float(log_p[:, half:-1].gather(2, ids[:, half + 1 :, None]).mean())
    assert found["loss"] == pytest.approx(loss, rel=1e-5) and found["perplexity"] == pytest.approx(
        math.exp(loss), rel=1e-4
    )
    # The study's own loss on held-out keys, given the right tokens before.
    kept = rows[(rows["measurement"] == "temperature") & (rows["scale"] == 1) & (rows["split"] == "trained")]
    kept = kept[kept["encoding"] == "learned"]
    data = encode(task.splits(n_train=4, n_validation=12, n_test=12).validation, task.vocabulary)
    total = 0.0
    for tokens, start, end in zip(data.tokens, data.prompt_lengths.tolist(), data.lengths.tolist(), strict=True):
        with torch.no_grad():
            log_p = model(tokens[None, :end]).logits[0].double().log_softmax(-1)
        total -= float(log_p[start - 1 : end - 1].gather(1, tokens[start:end, None]).sum())
    scored = int((data.lengths - data.prompt_lengths).sum())
    assert kept.set_index("metric")["value"]["loss"] == pytest.approx(total / scored, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"d_vocab": 390},
            "a decoder with encoding 'learned' and at least 400 tokens was wanted, got 'learned' and 390",
        ),
        ({"encoding": "none"}, "a decoder with encoding 'none' and at least 400 tokens was wanted, got 'learned' and"),
        ({"n_positions": 70}, "a decoder that knows 79 positions was wanted, got one of 70"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(place, tmp_path, changes, said):
    folder, _ = place
    encoding = changes.pop("encoding", "learned")
    gpt2(tmp_path / "other", **changes)
    config = study_of(folder, encodings=(encoding,), load={encoding: str(tmp_path / "other")})
    with pytest.raises(ProbeError, match=said) as error:
        run_study(config, tmp_path / "run", device="cpu", jobs=1)
    assert "\n" not in str(error.value)


def test_no_more_logits_are_held_than_are_allowed(place, monkeypatch):
    """A vocabulary of fifty thousand makes what a batch of bytes holds two hundred times as large."""
    folder, _ = place
    model = load_pretrained(folder / "gpt2", device="cpu")
    task = make_task("passkey", options(folder, train_length=64, test_length=80))
    texts, vocabulary = Beyond(task, extensions=(2,)).texts("test", 128, 8), task.vocabulary
    examples = task.splits(n_train=1, n_validation=8, n_test=1).validation
    held, wanted = [], 3 * 128 * 404
    model.register_forward_hook(lambda module, inputs, logits: held.append(logits.numel()))
    measures = [
        lambda: perplexity(model, texts.tokens, (128,))["value"],
        lambda: sweep_scale(model, texts, (1.2,), batch_size=8)["value"],
        lambda: train_scale(model, texts, ScaleTraining(steps=2, warmup=0)).scale.flatten(),
        lambda: predict(model, examples, vocabulary)["correct"].astype(float),
        lambda: passkey(model, task, (128,), (0.5,), n=8)["value"],
    ]
    free = [measure() for measure in measures]
    assert max(held) > wanted
    for measure, expected in zip(measures, free, strict=True):
        held.clear()
        with limits(logits_at_once=wanted):
            found = torch.tensor([*measure()])
        torch.testing.assert_close(found, torch.tensor([*expected]), atol=1e-5, rtol=1e-5)
        assert 0 < max(held) <= wanted


def test_a_model_can_be_trained_on_tokens(place, tmp_path):
    config = study_of(place[0], encodings=("none",), load={})
    assert train_one(config, "none", tmp_path / "run", device="cpu").config.d_vocab == 400


def test_commands_find_the_tokenizer_and_the_length(place, tmp_path, capsys):
    folder, _ = place
    common = [f"gpt2={folder}/gpt2", "--text", str(folder / "text"), *FEW, "--json"]
    assert main(["perplexity", *common, "--folder", str(tmp_path / "p")]) == 0
    rows = pd.DataFrame(map(json.loads, capsys.readouterr().out.splitlines()))
    # Trained with all of its 256 positions, and knows no other.
    assert set(rows["context"].dropna()) == {256}
    assert main(["passkey", *common, "--folder", str(tmp_path / "k"), "--depths", "0,1"]) == 0
    rows = pd.DataFrame(map(json.loads, capsys.readouterr().out.splitlines()))
    assert set(rows["length"]) == {256} and rows["value"].between(0, 1).all()
    scale = ["--train-length", "64", "--extensions", "2", "--steps", "2", "--tokenizer", str(folder / "gpt2")]
    assert main(["scale", *common, "--folder", str(tmp_path / "s"), *scale]) == 0
    capsys.readouterr()
    assert set(pd.read_parquet(tmp_path / "s" / "rows.parquet")["measurement"]) == set(BEYOND_STAGES)


def test_a_study_folder_names_its_tokenizer(study, place, tmp_path, capsys):
    arguments = ["--lengths", "70", "--depths", "0", "--folder", str(tmp_path / "k"), *FEW]
    assert main(["passkey", str(study), *arguments]) == 0
    assert "70" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpt2={gpt2}", "other={other}"], "share a tokenizer were wanted, but 'gpt2' and 'other' make other"),
        (["gpt2={gpt2}", "bytes={bytes}"], "share a tokenizer were wanted, but 'gpt2' and 'bytes' make other"),
        (["{bytes}"], "a model of 260 tokens, bytes, was wanted"),
        (["{bytes}", "--tokenizer", "{other}"], "a model of at least 420 tokens, those in {other}, was wanted, got"),
        (["{gpt2}", "--tokenizer", "{text}"], "{text}: a tokenizer was wanted (tokenizer.json, vocab.json"),
        (["{gpt2}", "--lengths", "300"], "the learned position table has 256 positions (n_ctx), got a sequence that"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(place, tmp_path, capsys, arguments, said):
    folder, _ = place
    gpt2(tmp_path / "other", d_vocab=420)
    byte_level(tmp_path / "other", vocab_size=420)
    make(tmp_path / "bytes", "gpt2")
    places = {"gpt2": folder / "gpt2", "text": folder / "text"} | {n: tmp_path / n for n in ("other", "bytes")}
    words = [word.format(**places) for word in arguments]
    rest = ["--text", str(folder / "text"), "--folder", str(tmp_path / "out"), *FEW]
    capsys.readouterr()
    assert main(["passkey", *words, *rest]) == 2
    error = capsys.readouterr().err
    assert said.format(**places) in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
