import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.errors import ProbeError
from probe.tasks import TASKS, make_task
from probe.tasks.base import SPECIALS, GeneratedTask, Vocabulary


@pytest.fixture(params=[name for name in TASKS if name != "jsonl"])
def task(request):
    return make_task(request.param)


def test_splits_never_share_an_example(task):
    splits = task.splits(n_train=2000, n_validation=200, n_test=200, seed=3)
    sources = [[e.source or e.target for e in part] for part in (splits.train, splits.validation, splits.test)]
    # Of the 510 strings of at most eight bits, some four hundred are trained on.
    small = task == make_task("parity")
    assert [len(s) for s in sources] == ([405, 52, 200] if small else [2000, 200, 200])
    everything = [source for part in sources for source in part]
    assert len(set(everything)) == len(everything)


def test_other_seeds_draw_other_examples_and_still_never_share(task):
    a, b = (task.splits(n_train=500, n_validation=40, n_test=40, seed=s) for s in (0, 1))
    assert a.train != b.train
    assert a == task.splits(n_train=500, n_validation=40, n_test=40, seed=0)
    if isinstance(task, GeneratedTask):  # the split is the source's
        assert not {e.source for e in a.train} & {e.source for e in (*b.validation, *b.test)}


def test_what_is_tested_is_longer(task):
    splits = task.splits(n_train=300, n_validation=30, n_test=150)
    assert all(1 <= e.length <= task.train_length for e in (*splits.train, *splits.validation))
    shortest = 1 if task in (make_task("copy"), make_task("reverse")) else task.train_length + 1
    assert all(shortest <= e.length <= task.test_length for e in splits.test)


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("parity", {}, 510),
        ("copy", {"variant": "rsc"}, 520),
        ("copy", {"variant": "rdc", "n_symbols": 5}, 400),
        ("copy", {"n_symbols": 2, "train_length": 3, "test_length": 3}, 14),
        ("reverse", {"n_symbols": 3, "train_length": 4, "test_length": 5, "prompt": True}, 120),
    ],
)
def test_a_small_language_gives_what_it_has(name, options, most):
    task = make_task(name, options)
    a, b = (task.splits(n_train=10**6, n_validation=0, n_test=0, seed=5) for _ in range(2))
    assert a == b
    assert 0.7 * most < len(a.train) <= most
    assert {e.length for e in a.train} >= set(range(2, task.train_length + 1))


def test_a_language_without_a_single_source_of_a_split():
    task = make_task("copy", {"n_symbols": 1, "train_length": 1, "test_length": 1})
    splits = task.splits(n_train=5, n_validation=5, n_test=5)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 1
    missing = {f"n_{name}": 0 if getattr(splits, name) else 5 for name in ("train", "validation", "test")}
    with pytest.raises(ProbeError, match="examples were wanted, but lengths 1…1 hold none of the splits asked for"):
        task.splits(**missing)
    assert task.splits(n_train=0, n_validation=0, n_test=0).test == []


# The first draws of version 0.1.0: the options that came later leave them as they were.
@pytest.mark.parametrize(("name", "digest"), [("copy", "e668462b3929c54c"), ("reverse", "ebde46d0db9e7645")])
def test_draws_stay_as_they_are(name, digest):
    splits = make_task(name).splits(n_train=2000, n_validation=300, n_test=700, seed=4)
    text = repr([(e.source, e.target, e.length) for e in (*splits.train, *splits.validation, *splits.test)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_every_token_is_in_the_vocabulary_and_comes_back(task):
    splits = task.splits(n_train=200, n_validation=10, n_test=10)
    vocabulary = task.vocabulary
    for example in splits.train:
        prompt, completion = vocabulary.prompt(example), vocabulary.completion(example)
        assert vocabulary.decode(prompt) == ["<bos>", *example.source, "<sep>"]
        assert vocabulary.decode(completion) == [*example.target, *["<eos>"] * example.ends]
    assert all(example.ends for example in (*splits.validation, *splits.test))


@pytest.mark.parametrize(("name", "answer"), [("copy", lambda s: s), ("reverse", lambda s: s[::-1])])
@given(seed=st.integers(0, 10**6), train=st.integers(2, 30), extra=st.integers(0, 30))
@settings(max_examples=20, deadline=None)
def test_copy_and_reverse(name, answer, seed, train, extra):
    task = make_task(name, {"train_length": train, "test_length": train + extra})
    splits = task.splits(n_train=10, n_validation=2, n_test=2, seed=seed)
    for example in (*splits.train, *splits.validation, *splits.test):
        assert example.target == answer(example.source)
        assert example.length == len(example.source)
    assert all(1 <= e.length <= train for e in (*splits.train, *splits.validation))
    assert all(1 <= e.length <= train + extra for e in splits.test)


def test_all_lengths_are_drawn():
    splits = make_task("copy").splits(n_train=2000, n_validation=10, n_test=2000)
    assert {e.length for e in splits.train} == set(range(1, 21))
    assert {e.length for e in splits.test} == set(range(1, 41))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "sort",
            {},
            "unknown task 'sort'; known: addition, copy, jsonl, lego, parity, passkey, pcfg, polynomial, reverse,",
        ),
        (
            "copy",
            {"size": 3},
            "unknown option of task 'copy': 'size'; known: n_symbols, prompt, test_length, train_length",
        ),
        ("copy", {"train_length": 0}, "train_length of task 'copy' must be a positive integer, got 0"),
        ("pcfg", {"train_length": True}, "train_length of task 'pcfg' must be a positive integer, got True"),
        ("copy", {"test_length": 3}, r"test_length \(3\) must be at least train_length \(20\)"),
        ("lego", {"test_length": 8}, r"test_length \(8\) must be above train_length \(8\)"),
        ("copy", {"variant": "mc"}, "unknown variant of task 'copy': 'mc'; known: cmc, cmc2x, rdc, rsc, rsc2x"),
        ("copy", {"variant": ["mc"]}, r"unknown variant of task 'copy': \['mc'\]; known"),
        ("copy", {"variant": "rdc", "n_symbols": 1}, "n_symbols must be at least 2 to replace one by another"),
        ("lego", {"order": "random"}, "unknown order of task 'lego': 'random'; known: ordered, permuted"),
        ("pcfg", {"split": "depth"}, "unknown split of task 'pcfg': 'depth'; known: md_productivity, productivity"),
        ("pcfg", {"longest": 4}, "longest of task 'pcfg' must be at least 5"),
        ("parity", {"prompt": 1}, "prompt of task 'parity' must be true or false, got 1"),
        (
            "parity",
            {"scratchpad": ["inputs"]},
            "unknown scratchpad of task 'parity': 'inputs'; known: computation, ",
        ),
        ("parity", {"scratchpad": [["input"]]}, "unknown scratchpad of task 'parity'"),
        ("parity", {"scratchpad": "input"}, "scratchpad of task 'parity' must be a list of names, got 'input'"),
        (
            "parity",
            {"scratchpad": ["input", "input"]},
            "must name each once, got input, input",
        ),
        ("sorting", {"n_symbols": 63}, "n_symbols must be at most 62, got 63"),
        ("jsonl", {}, "path of task 'jsonl' must be a text that is not empty, got ''"),
        ("jsonl", {"path": 3}, "path of task 'jsonl' must be a text that is not empty, got 3"),
    ],
)
def test_a_bad_option_is_one_clear_line(name, options, message):
    with pytest.raises(ProbeError, match=message) as error:
        make_task(name, options)
    assert "\n" not in str(error.value)


def test_lists_become_tuples():
    task = make_task("parity", {"scratchpad": ["output", "input"]})
    assert task.scratchpad == ("output", "input")
    assert hash(task) == hash(make_task("parity", {"scratchpad": ("output", "input")}))


def test_bad_input_is_one_clear_line(task):
    with pytest.raises(ProbeError, match="token 'z' is not in the vocabulary of 6 tokens"):
        Vocabulary(["a", "b"]).encode(["a", "z"])
    with pytest.raises(ProbeError, match="must differ"):
        Vocabulary(["a", SPECIALS[0]])
    if isinstance(task, GeneratedTask):
        with pytest.raises(ProbeError, match="length must be an integer of at least 1, got 0"):
            task.draw(0, np.random.default_rng(0))
