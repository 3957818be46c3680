"""Inputs found by the branches that they reach in ``probe``: one door, for some seconds, under atheris.

    python3.11 -m venv FUZZ && FUZZ/bin/pip install atheris
    PYTHONPATH=.venv/lib/python3.11/site-packages:tests/support:. FUZZ/bin/python tests/hostile/fuzz.py DOOR SECONDS

Atheris wants Python 3.11 or so and is no dependency of this package, whose own are taken from its environment. Whatever
is no refusal in one line (``hostile.refused``) ends the run and leaves the input in ``crash-…`` of a temporary folder.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["probe"]):
    from hostile import arrays, command, idle, refused, tensors_file

    from probe.league import read_published
    from probe.models.pretrained import load_pretrained
    from probe.study.places import read_tokens
    from probe.tasks import make_task
    from probe.tasks.tokenizers import TextVocabulary
    from probe.training.log import newest_log_entry

FOLDER = Path(tempfile.mkdtemp())
DECODER = b'{"d_vocab": 3, "n_ctx": 4, "n_layers": 1, "d_model": 4, "n_heads": 2, "encoding": "rotary"}'
LLAMA = {
    **{"model_type": "llama", "vocab_size": 3, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"intermediate_size": 4, "max_position_embeddings": 8, "rope_parameters": {"rope_type": "default"}},
}


def kept(name: str, content: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(content)
    return path


def config(content: bytes) -> None:
    kept("config.json", content)
    kept("model.safetensors", tensors_file({}))
    refused(lambda: load_pretrained(FOLDER, device="cpu"))


def weights(content: bytes) -> None:
    kept("config.json", DECODER)
    kept("model.safetensors", content)
    refused(lambda: load_pretrained(FOLDER, device="cpu"))


def study(content: bytes) -> None:
    with idle():
        command("study", "--config", kept("settings.json", content), "--folder", FOLDER / "out")


def sweep(content: bytes) -> None:
    with idle():
        command("sweep", "--config", kept("settings.json", content), "--folder", FOLDER / "out")


def flags(content: bytes) -> None:
    with idle():
        command("study", *content.decode("utf-8", "surrogateescape").split("\n"))


def examples(content: bytes) -> None:
    task = make_task("jsonl", {"path": str(kept("mine.jsonl", content))})
    refused(lambda: (task.splits(n_train=1, n_validation=1, n_test=1), len(task.vocabulary)))


def tokens(content: bytes) -> None:
    refused(lambda: read_tokens(kept("ids.npy", content)))


def published(content: bytes) -> None:
    refused(lambda: read_published(kept("table.csv", content)))


def tokenizer(content: bytes) -> None:
    kept("tokenizer.json", content)
    refused(lambda: TextVocabulary(FOLDER).tokenize(" ab"))


def log(content: bytes) -> None:
    kept("log.jsonl", content)
    assert refused(lambda: newest_log_entry(FOLDER)) is None


# Each with what it begins from.
DOORS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "config": (config, [DECODER, json.dumps(LLAMA).encode(), b'{"model": "clockwork", "d_vocab": 3, "d_model": 4}']),
    "weights": (weights, [tensors_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))]),
    "study": (study, [b'{"task": "copy", "encodings": ["none"], "seeds": {"none": 1}, "training": {"steps": 1}}']),
    "sweep": (sweep, [b'{"tasks": {"a": {"task": "copy"}}, "encodings": ["none"], "seeds": [0]}']),
    "flags": (flags, [b"--task=copy\n--encodings=none\n--task-options=train_length=2", b"--n-layers=2\n--config=x"]),
    "examples": (examples, [b'{"source": "a b", "target": ["c"], "length": 2, "split": "test"}\n']),
    "tokens": (tokens, [arrays()]),
    "published": (published, [b"dataset,split,encoding,seed,length,accuracy\na,b,none,0,overall,0.5\n"]),
    "tokenizer": (
        tokenizer,
        [b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}'],
    ),
    "log": (log, [b'{"step": 5, "loss": 0.5}\n']),
}


if __name__ == "__main__":
    name, seconds = sys.argv[1:]
    door, seeds = DOORS[name]
    corpus = Path(tempfile.mkdtemp())
    for i, seed in enumerate(seeds):
        (corpus / str(i)).write_bytes(seed)
    os.chdir(corpus)
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-rss_limit_mb=4096", "-timeout=5", str(corpus)], door)
    atheris.Fuzz()
