"""Every door through which a file comes in: it opens plain files only, and has its bound in time and memory."""

import json
import os
import time
import tracemalloc
from pathlib import Path

import pytest
from hostile import command, fresh, idle, refused

from probe.errors import ProbeError
from probe.files import read_json_object, read_rows
from probe.league import read_published
from probe.limits import Limits
from probe.models import checkpoint
from probe.models.pretrained import load_pretrained
from probe.study.places import find_checkpoints, read_tokens
from probe.sweep.results import read_results
from probe.tasks import make_task
from probe.training.log import newest_log_entry
from probe.training.run_folder import checkpoints_of


def settings(path):
    with idle():
        return command("study", "--config", path, "--folder", path.parent / "out")


# What reads a file, by the name that the file has in a folder.
DOORS = {
    "config.json": lambda folder: refused(lambda: load_pretrained(folder, device="cpu")),
    "model.safetensors": lambda folder: refused(lambda: checkpoint.read_tensors(folder / "model.safetensors")),
    "study.json": lambda folder: refused(lambda: find_checkpoints([str(folder)])),
    "run.json": lambda folder: refused(lambda: list(checkpoints_of(folder))),
    "log.jsonl": lambda folder: refused(lambda: newest_log_entry(folder)),
    "ids.npy": lambda folder: refused(lambda: read_tokens(folder / "ids.npy")),
    "rows.parquet": lambda folder: refused(lambda: read_rows(folder / "rows.parquet")),
    "results/a.parquet": lambda folder: refused(lambda: read_results(folder)),
    "mine.jsonl": lambda folder: refused(lambda: make_task("jsonl", {"path": str(folder / "mine.jsonl")}).examples),
    "table.csv": lambda folder: refused(lambda: read_published(folder / "table.csv")),
    "settings.json": lambda folder: settings(folder / "settings.json"),
    "report.html": lambda folder: command("figures", folder / "report.html"),
}


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir])
@pytest.mark.parametrize("name", DOORS)
def test_a_door_opens_plain_files_only(name, make, make_decoder):
    if name == "report.html" and make is os.mkdir:
        pytest.skip("a folder is one with a report in it")
    with fresh() as folder:
        if name == "run.json":
            (folder / "checkpoints" / "step-000000000").mkdir(parents=True)
            for place in ("checkpoints/step-000000000", "final"):
                (folder / place).mkdir(exist_ok=True)
                checkpoint.write_into(make_decoder(), folder / place)
        (folder / name).parent.mkdir(exist_ok=True)
        make(folder / name)
        assert f"{Path(name).name}: must be a plain file" in (DOORS[name](folder) or "")


@pytest.mark.parametrize("n", [20_000, 60_000])
def test_a_key_that_comes_twice_is_found_in_linear_time(n, tmp_path):
    """Counting every name in the list of names took 5 s for 20,000, and more than 250 s for 60,000."""
    pairs = [f'"k{i}": {i}' for i in range(n)]
    (tmp_path / "a.json").write_text("{" + ", ".join([*pairs, f'"k{n - 1}": 0']) + "}")
    started = time.process_time()
    with pytest.raises(ProbeError, match=f"must be JSON: each key must be given once, got 'k{n - 1}' again"):
        read_json_object(tmp_path / "a.json")
    assert time.process_time() - started < 1


def test_json_of_many_small_values_is_refused_before_it_is_parsed(tmp_path):
    """22 million empty objects in 66 MB took 1.6 GB of memory."""
    for content in (b'{"a": [' + b"{}," * Limits().json_values + b"0]}", b" " * (Limits().json_bytes + 1)):
        (tmp_path / "a.json").write_bytes(content)
        tracemalloc.start()
        with pytest.raises(ProbeError, match=r"a\.json: must be JSON of at most \d+ (values|bytes), got more"):
            read_json_object(tmp_path / "a.json")
        assert tracemalloc.get_traced_memory()[1] < 2 * Limits().json_bytes
        tracemalloc.stop()


def test_an_index_as_large_as_the_largest_is_read(tmp_path):
    names = {f"model.layers.{i}.mlp.experts.{j}.down_proj.weight_scale_inv": f"model-{i:05d}-of-00163.safetensors"
             for i in range(61) for j in range(2400)}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps({"weight_map": names}))
    assert read_json_object(tmp_path / "a.json")["weight_map"] == names


def test_a_line_of_many_small_values_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"source": [' + b"[]," * Limits().json_values + b"[]]}")
    message = refused(lambda: make_task("jsonl", {"path": str(tmp_path / "a.jsonl")}).examples)
    assert "line 1: must be JSON of at most" in message
