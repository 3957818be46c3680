import json

import pytest

from probe.errors import ProbeError
from probe.tasks import make_task


def write(tmp_path, *lines):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return make_task("jsonl", {"path": str(path), "train_length": 3})


def test_splits_of_the_file(tmp_path):
    task = write(
        tmp_path,
        {"source": "jump  twice", "target": ["JUMP", "JUMP"], "length": 2, "split": "train"},
        "",
        {"source": ["tanz", "dreimal", "schön"], "target": "T T T", "length": 30, "split": "train", "note": 1},
        {"source": "run", "target": "", "length": 1, "split": "validation"},
        {"source": "walk", "target": "WALK", "length": 1, "split": "test"},
        {"source": "walk", "target": "WALK", "length": 1, "split": "test"},
    )
    splits = task.splits(n_train=10, n_validation=10, n_test=10)
    assert {e.source for e in splits.train} == {("jump", "twice"), ("tanz", "dreimal", "schön")}
    assert [(e.source, e.target, e.length) for e in splits.validation] == [(("run",), (), 1)]
    assert [e.target for e in splits.test] == [("WALK",)]
    words = ["JUMP", "T", "WALK", "dreimal", "jump", "run", "schön", "tanz", "twice", "walk"]
    assert task.vocabulary.tokens[4:] == tuple(words)
    assert len(task.splits(n_train=1, n_validation=0, n_test=0).train) == 1


def test_splits_by_length_and_hash(tmp_path):
    task = write(tmp_path, *({"source": f"a {i}", "target": "b", "length": i % 5 + 1} for i in range(500)))
    splits = task.splits(n_train=500, n_validation=500, n_test=500, seed=1)
    assert {e.length for e in (*splits.train, *splits.validation)} == {1, 2, 3}
    assert sum(e.length > 3 for e in splits.test) == 200
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 500
    assert 200 < len(splits.train) < 280 and len(splits.validation) > 10
    assert splits == task.splits(n_train=500, n_validation=500, n_test=500, seed=1)
    assert splits != task.splits(n_train=500, n_validation=500, n_test=500, seed=2)


GOOD = {"source": "a", "target": "b", "length": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a JSON object was wanted, got '{'"),
        ("[1]", r"a JSON object was wanted, got \[1\]"),
        ("[" * 100_000, r"a JSON object was wanted, got '\[\[.*…"),
        ({"source": "c", "length": 1}, "'target' is missing"),
        ({"source": 3, "target": "b", "length": 1}, "source must be a text or a list of words, got 3"),
        ({"source": ["a", 1], "target": "b", "length": 1}, r"source must be a text or a list of words, got \['a', 1\]"),
        ({"source": "c", "target": None, "length": 1}, "target must be a text or a list of words, got None"),
        ({"source": "c", "target": "b", "length": 0}, "length must be a positive integer, got 0"),
        ({"source": "c", "target": "b", "length": True}, "length must be a positive integer, got True"),
        ({"source": "c", "target": "b", "length": 1.5}, "length must be a positive integer, got 1.5"),
        ({"source": " ", "target": "b", "length": 1}, "source must have at least one word, got none"),
        ({"source": [], "target": "b", "length": 1}, "source must have at least one word, got none"),
        ({"source": "<pad> c", "target": "b", "length": 1}, "source must do without the special token '<pad>'"),
        ({"source": "\ud800", "target": "b", "length": 1}, "source must be Unicode text"),
        ({**GOOD, "source": "c", "split": "dev"}, "unknown split in .*: 'dev'; known: test, train, validation"),
        ({**GOOD, "source": "c", "split": ["test"]}, r"unknown split in .*: \['test'\]; known"),
        ({**GOOD, "target": "c"}, "the source of line 1, with another target, length or split"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    task = write(tmp_path, GOOD, "", line)
    with pytest.raises(ProbeError, match=message) as error:
        task.splits(n_train=1, n_validation=1, n_test=1)
    assert "mine.jsonl, line 3" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ProbeError, match=message):
        len(task.vocabulary)


def test_a_bad_file_is_named(tmp_path):
    with pytest.raises(ProbeError, match="mine.jsonl: at least one example was wanted, got none"):
        len(write(tmp_path, "", " ").vocabulary)
    with pytest.raises(ProbeError, match="nowhere.jsonl: no such file"):
        len(make_task("jsonl", {"path": str(tmp_path / "nowhere.jsonl")}).vocabulary)
    with pytest.raises(ProbeError, match="must be a plain file, got a folder"):
        len(make_task("jsonl", {"path": str(tmp_path)}).vocabulary)
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"source": "schön", "target": "b", "length": 1}'.encode("latin-1"))
    with pytest.raises(ProbeError, match="latin.jsonl, line 1: a JSON object was wanted"):
        len(make_task("jsonl", {"path": str(path)}).vocabulary)
    with pytest.raises(ProbeError, match="mine.jsonl: an example to train on was wanted, of length 1…3, got none"):
        write(tmp_path, {**GOOD, "length": 4}).splits(n_train=1, n_validation=1, n_test=1)
