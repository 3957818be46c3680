"""Folders of released models at every door: our families, transformers under a bridge, tokenizers."""

import io
import json
import os
import random
import signal
from contextlib import contextmanager

import pytest
import torch
import transformers
from hostile import Payload, refused, tensors_file
from released import GPT2, LLAMA, configure, make
from safetensors.torch import save_file

from probe.models.pretrained import load_pretrained

KINDS = ("gpt2", "qwen2")  # one of our decoder, one of a bridge


def save(folder, kind, **options):
    """A small model of transformers' in a folder."""
    if kind == "gpt2":
        return make(folder, "gpt2", options)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **LLAMA | {"num_key_value_heads": 2} | options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model


@contextmanager
def no_longer_than(seconds):
    """What would wait for ever is broken off."""

    def give_up(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_names_plain_safetensors_in_the_same_folder_or_is_refused(kind, tmp_path):
    model, marker = save(tmp_path / "in", kind), tmp_path / "marker"
    (weights := tmp_path / "in" / "model.safetensors").rename(tmp_path / "x.safetensors")
    pickled = io.BytesIO()
    torch.save({"a": Payload(marker)}, pickled)
    for name in ("weights.bin", "weights.pt", "weights.safetensors"):
        (tmp_path / "in" / name).write_bytes(pickled.getvalue())
    (tmp_path / "in" / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "in" / "pipe.safetensors")
    index = weights.with_name("model.safetensors.index.json")
    keys = [key for key in model.state_dict() if key != "lm_head.weight"]
    for name, message in {
        "weights.bin": "must lie in a file that ends in .safetensors, got 'weights.bin'",
        "weights.pt": "must lie in a file that ends in .safetensors",
        "weights.safetensors": "not a whole safetensors file",
        "../x.safetensors": "must lie in a file of the same folder, got '../x.safetensors'",
        str(tmp_path / "x.safetensors"): "must lie in a file of the same folder",
        "..\\x.safetensors": "must lie in a file of the same folder",
        "folder.safetensors": "must be a plain file, got a folder",
        "pipe.safetensors": "must be a plain file, got a pipe",
        "nowhere.safetensors": "no such file",
    }.items():
        index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, name)}))
        with no_longer_than(5):
            assert message in refused(lambda: load_pretrained(tmp_path / "in")), name
    assert not marker.exists()
    # What lies in a hub's cache is a link to a file elsewhere, of another name.
    (tmp_path / "blobs").mkdir()
    (tmp_path / "x.safetensors").rename(tmp_path / "blobs" / "abc")
    (tmp_path / "in" / "linked.safetensors").symlink_to("../blobs/abc")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, "linked.safetensors")}))
    with no_longer_than(30):
        load_pretrained(tmp_path / "in")


def test_a_pipe_under_any_name_keeps_nobody_waiting(tmp_path):
    """Those that are read are refused, and the others are nobody's."""
    names = ("config.json", "model.safetensors", "model.safetensors.index.json", "generation_config.json")
    names += ("adapter_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json")
    names += ("pytorch_model.bin", "chat_template.jinja")
    for kind in KINDS:
        save(folder := tmp_path / kind, kind)
        for name in names:
            path, aside = folder / name, folder / "aside"
            if path.exists():
                path.rename(aside)
            os.mkfifo(path)
            with no_longer_than(20):
                message = refused(lambda folder=folder: load_pretrained(folder))
            assert (message is not None) == (name in names[:2]), (name, message)
            assert message is None or "must be a plain file, got a pipe" in message
            path.unlink()
            if aside.exists():
                aside.rename(path)


MISSING = "missing keys in its weights"
LAYERS = "must be an integer of at most 1024, got 1000000"
CLAIMS = {
    "300 bytes": ("qwen2", LLAMA | {"vocab_size": 10**6, "hidden_size": 1024}, MISSING),
    "experts": ("qwen2_moe", LLAMA | {"num_experts": 10**6}, MISSING),
    "experts of mixtral": ("mixtral", LLAMA | {"num_local_experts": 10**6}, MISSING),
    "layers": ("qwen2", LLAMA | {"num_hidden_layers": 1024}, "the config must ask for at most 4160 modules"),
    "nested layers": ("gemma3", {"text_config": LLAMA | {"num_hidden_layers": 10**6}}, LAYERS),
    "layers under another name": ("qwen2_moe", LLAMA | {"max_window_layers": 10**6}, LAYERS),
    "labels": ("qwen2", LLAMA | {"num_labels": 10**9}, MISSING),
    "heads": ("qwen2", LLAMA | {"head_dim": 10**9}, MISSING),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_a_config_claims_costs_neither_memory_nor_time(claim, tmp_path):
    kind, values, message = CLAIMS[claim]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | values))
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "model.safetensors")
    assert message in refused(lambda: load_pretrained(tmp_path, device="cpu"))


def test_a_table_that_no_file_holds_costs_no_memory(tmp_path):
    save(tmp_path, "codegen", **GPT2, rotary_dim=4)
    configure(tmp_path, n_positions=2**28)
    assert "the config's tables must take at most" in refused(lambda: load_pretrained(tmp_path))


def test_a_header_of_any_length_is_not_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"} | LLAMA))
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(tensors_file(b"{}", length=2**26))
        file.truncate(2**27)
    assert "a header of at most" in refused(lambda: load_pretrained(tmp_path))


ODD = [
    ("qwen2", "max_position_embeddings", -5),
    ("qwen2", "layer_types", ["full_attention"]),
    ("qwen2", "hidden_act", "no"),
    ("qwen3", "head_dim", 0),
    ("gemma2", "query_pre_attn_scalar", -1),
    ("gemma2", "query_pre_attn_scalar", 0),
    ("gemma2", "sliding_window", 0),
    ("mistral", "sliding_window", -3),
    ("cohere2", "sliding_window_pattern", 0),
    ("granite", "attention_multiplier", "x"),
    ("phi", "partial_rotary_factor", 0.01),
]
ODDITIES = (-5, 0, -1, 0.0, 1e308, 2**40, "x", None, [], ["full_attention"], {}, {"a": 1}, True, 3)


def test_odd_configs_of_bridges_are_one_line(tmp_path):
    """The first pass runs on what a config says, and may fail in any way."""
    small = {"head_dim": 8, "num_hidden_layers": 1, "num_key_value_heads": 2}
    rng, cases = random.Random(0), list(ODD)
    kinds = ("qwen2", "qwen3", "gemma2", "mistral", "cohere2", "granite", "phi", "stablelm", "olmo")
    for kind in kinds:
        options = {} if kind != "phi" else {"num_key_value_heads": 4}
        save(tmp_path / kind, kind, **small | options)
        known = json.loads((tmp_path / kind / "config.json").read_text())
        cases += [(kind, rng.choice(sorted(known)), rng.choice(ODDITIES)) for _ in range(4)]
    outcomes = []
    for kind, key, value in cases:
        path = tmp_path / kind / "config.json"
        whole = path.read_text()
        path.write_text(json.dumps(json.loads(whole) | {key: value}))
        with no_longer_than(20):
            outcomes.append(refused(lambda kind=kind: load_pretrained(tmp_path / kind, device="cpu")))
        assert outcomes[-1] is None or "\n" not in outcomes[-1]
        path.write_text(whole)
    assert sum(outcome is not None for outcome in outcomes) > len(ODD) / 2
