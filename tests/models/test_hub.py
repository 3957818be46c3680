"""Names on the hub, with a hub on this machine: nothing leaves it."""

import os
import subprocess
import sys

import pytest
import torch
from fake_hub import COMMIT, serve
from released import make

import probe
from probe.errors import ProbeError
from probe.models.hub import find_folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    make(folder, "gpt2", {"n_layer": 1})
    (folder / "tokenizer.json").write_text("{}")
    for name in ("pytorch_model.bin", "modeling_gpt2.py", "README.md"):
        (folder / name).write_text("never to be fetched")
    pickled = tmp_path_factory.mktemp("pickled")
    (pickled / "config.json").write_text('{"model_type": "gpt2"}')
    (pickled / "pytorch_model.bin").write_text("a pickle")
    return {"owner/model": folder, "owner/pickled": pickled}


def run(script, home, **environment):
    """A script in a process of its own: huggingface_hub reads its settings when it is imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=home,
        env={**kept, "HF_HOME": str(home / "hf"), **environment},
    )
    return done.stdout.strip(), done.stderr


LOAD = """
import probe
for revision in {revisions!r}:
    model = probe.load_pretrained("owner/model", revision)
    print(model.config.encoding, model.config.n_layers)
"""
FAIL = """
import probe
for name, revision in {asked!r}:
    try: probe.load_pretrained(name, revision)
    except probe.ProbeError as error: print(error)
"""


def test_a_name_is_fetched_into_the_cache_and_then_loads_without_a_network(released, tmp_path):
    with serve(released) as hub:
        out, err = run(LOAD.format(revisions=[None, COMMIT]), tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret")
        assert out == "learned 1\nlearned 1", err
        # Data only; the token that its own tools know goes along.
        assert hub.fetched() == {"config.json", "model.safetensors", "tokenizer.json"}
        assert ("GET", "/api/models/owner/model/revision/main", "Bearer hf_secret") in hub.asked
    assert run(LOAD.format(revisions=[None]), tmp_path, HF_HUB_OFFLINE="1")[0] == "learned 1"
    assert run(LOAD.format(revisions=[None]), tmp_path, HF_ENDPOINT="http://127.0.0.1:9")[0] == "learned 1"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]  # nothing but the cache


def test_what_the_hub_does_not_give_is_one_clear_line(released, tmp_path):
    messages = {
        ("owner/nobody", None): "owner/nobody: no such folder, and no such model on the hub; for a private one log in",
        ("owner/gated", None): "owner/gated: its terms are to be accepted on its page on the hub; then log in",
        ("owner/model", "v9"): "owner/model: no revision 'v9' on the hub",
        ("owner/pickled", None): "owner/pickled: has no safetensors, and a pickle can run code; a pull request there",
    }
    with serve(released, gated=("owner/gated",)) as hub:
        out, err = run(FAIL.format(asked=[*messages]), tmp_path, HF_ENDPOINT=hub.url)
    assert len(out.splitlines()) == len(messages), out + err
    for line, message in zip(out.splitlines(), messages.values(), strict=True):
        assert line.startswith(message)


@pytest.mark.parametrize(
    ("environment", "why"),
    [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"), ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "out of reach")],
)
def test_without_a_network_the_command_to_fetch_is_said(environment, why, tmp_path):
    out, err = run(FAIL.format(asked=[("owner/model", "v1")]), tmp_path, **environment)
    assert "\n" not in out and why in out, out + err
    assert out.startswith("owner/model at revision 'v1': no such folder, not whole in the cache")
    assert "hf download owner/model --revision v1 --local-dir FOLDER, then load FOLDER" in out
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_folders_come_first_and_have_no_revisions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "owner" / "model", "gpt2", {"n_layer": 1})
    assert find_folder("owner/model").resolve() == tmp_path / "owner" / "model"
    assert probe.load_pretrained("owner/model").device == torch.device("cpu")
    with pytest.raises(ProbeError, match="a folder has no revisions, got 'main'"):
        find_folder("owner/model", "main")
    for name in (tmp_path / "nowhere", "/no/where", "../model", "a/b/c", "owner/ model"):
        with pytest.raises(ProbeError, match="no such folder$"):
            find_folder(name)
