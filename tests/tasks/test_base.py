import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.errors import ProbeError
from probe.tasks import TASKS, make_task
from probe.tasks.base import SPECIALS, Vocabulary


@pytest.fixture(params=TASKS)
def task(request):
    return make_task(request.param)


def test_splits_never_share_an_example(task):
    splits = task.splits(n_train=3000, n_validation=400, n_test=800, seed=3)
    sources = [[e.source for e in part] for part in (splits.train, splits.validation, splits.test)]
    assert [len(s) for s in sources] == [3000, 400, 800]
    everything = [source for part in sources for source in part]
    assert len(set(everything)) == len(everything)


def test_other_seeds_draw_other_examples_and_still_never_share(task):
    a, b = (task.splits(n_train=1000, n_validation=100, n_test=100, seed=s) for s in (0, 1))
    assert a.train != b.train
    if task.vocabulary.tokens[4:] == tuple("abcdefghijklmnopqrstuvwxyz"):  # the drawn tasks: the split is the source's
        assert not {e.source for e in a.train} & {e.source for e in (*b.validation, *b.test)}


def test_every_token_is_in_the_vocabulary_and_comes_back(task):
    splits = task.splits(n_train=200, n_validation=10, n_test=10)
    vocabulary = task.vocabulary
    for example in splits.train:
        prompt, completion = vocabulary.prompt(example), vocabulary.completion(example)
        assert vocabulary.decode(prompt) == ["<bos>", *example.source, "<sep>"]
        assert vocabulary.decode(completion) == [*example.target, "<eos>"]


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


def test_bad_input_is_one_clear_line():
    with pytest.raises(ProbeError, match="unknown task 'sort'; known: copy, reverse, scan"):
        make_task("sort")
    with pytest.raises(ProbeError, match="unknown option of task 'copy': 'size'; known: n_symbols, test_length"):
        make_task("copy", {"size": 3})
    with pytest.raises(ProbeError, match="train_length of task 'copy' must be a positive integer, got 0"):
        make_task("copy", {"train_length": 0})
    with pytest.raises(ProbeError, match=r"test_length \(3\) must be at least train_length \(20\)"):
        make_task("copy", {"test_length": 3})
    with pytest.raises(ProbeError, match="1000 train examples were wanted, but lengths 1…2 seem to hold only"):
        make_task("copy", {"train_length": 2, "n_symbols": 3}).splits(n_train=1000, n_validation=1, n_test=1)
    with pytest.raises(ProbeError, match="token 'z' is not in the vocabulary of 6 tokens"):
        Vocabulary(["a", "b"]).encode(["a", "z"])
    with pytest.raises(ProbeError, match="must differ"):
        Vocabulary(["a", SPECIALS[0]])
