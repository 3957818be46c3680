import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.errors import ProbeError
from probe.tasks import make_task
from probe.tasks.byte_vocabulary import byte_tokens
from probe.tasks.passkey import NAMES
from probe.training import encode

ONE = make_task("passkey")
THREE = make_task("passkey", {"n_keys": 3, "train_length": 300, "test_length": 400})
SENTENCES = make_task("passkey", {"filler": "sentences"})


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([ONE, THREE, SENTENCES]), st.integers(0, 900), st.floats(0, 1), st.integers(0, 10**6),
    st.sampled_from(["train", "test"]),
)  # fmt: skip
def test_a_prompt_holds_its_key_once_where_it_says(task, more, depth, seed, split):
    length = task.least_length + more
    prompt = task.prompt(length, depth, np.random.default_rng(seed), split)
    key = prompt.key.encode()
    assert re.fullmatch(rb"[1-9]\d{4}", key)
    assert prompt.text.count(key) == 1
    assert prompt.text[prompt.start :].startswith(key)
    # The sequence has the length that was asked for, and the filler in front of the sentence is its share.
    assert len(prompt.text) + len(key) + 3 == length  # <bos>, <sep> and <eos>
    sentences = list(re.finditer(rb"\nThe pass key(?: of (\w+))? is (\d{5})\. Remember it\.\n", prompt.text))
    assert len({s[2] for s in sentences}) == len(sentences) == task.n_keys
    own = next(s for s in sentences if s[2] == key)
    assert own.start(2) == prompt.start
    asked = re.search(rb"\nWhat is the pass key(?: of (\w+))?\? The pass key(?: of (\w+))? is $", prompt.text)
    assert asked[1] == asked[2] == own[1]
    before = own.start() - sum(len(s[0]) for s in sentences if s.start() < own.start())
    filler = asked.start() - sum(len(s[0]) for s in sentences)
    assert prompt.depth == (before / filler if filler else 0)
    assert abs(before - depth * filler) <= 0.5


def test_splits_are_of_their_lengths_and_their_files():
    splits = ONE.splits(n_train=40, n_validation=20, n_test=20, seed=1)
    keyed = [e for e in splits.train if e.source]
    assert len(keyed) == 20
    assert all(ONE.least_length <= e.length <= 256 for e in (*keyed, *splits.validation))
    assert all(256 < e.length <= 512 for e in splits.test)
    data = encode(splits.train, ONE.vocabulary)
    assert data.lengths.tolist() == [e.length for e in splits.train]
    texts = {split: b"\0".join(ONE.corpus.texts[split]) for split in ONE.corpus.texts}
    spell = {token: i for i, token in enumerate(ONE.vocabulary.tokens[4:])}
    for split, examples in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        for e in examples:
            text = bytes(spell[token] for token in (e.source or e.target))
            start = re.split(rb"\nThe pass key is|\nWhat is", text)[0]
            assert start in texts[split]


def test_text_share_is_the_share_of_plain_text():
    for share, n in ((0.0, 0), (0.25, 10), (0.5, 20)):
        task = make_task("passkey", {"text_share": share})
        train = task.splits(n_train=40, n_validation=1, n_test=1).train
        assert sum(not e.source for e in train) == n
        assert all(e.length == 256 for e in train if not e.source)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train_length": 83}, "train_length must be at least 84, the prompt without filler, got 83"),
        ({"train_length": 90, "test_length": 90}, r"test_length \(90\) must be above train_length \(90\)"),
        ({"n_keys": 25, "train_length": 9999}, f"n_keys must be at most {len(NAMES)}"),
        ({"text_share": 1.0}, "text_share of task 'passkey' must be a number at least 0 and below 1"),
        ({"text_share": "half"}, "text_share of task 'passkey' must be a number, got 'half'"),
        ({"filler": "noise"}, "filler"),
    ],
)
def test_wrong_options_are_refused(options, said):
    with pytest.raises(ProbeError, match=said):
        make_task("passkey", options)


def test_a_length_without_room_and_a_depth_outside_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ProbeError, match="length of a passkey prompt must be an integer of at least 84, got 60"):
        ONE.prompt(60, 0.5, rng)
    with pytest.raises(ProbeError, match="depth must lie in 0…1, got 1.5"):
        ONE.prompt(200, 1.5, rng)


def test_byte_prompts_are_those_of_the_rows_that_are_kept():
    """What committed rows were measured on: nothing about the drawing may change."""
    prompt = SENTENCES.prompt(120, 0.4, np.random.default_rng(7))
    assert prompt.text.decode() == (
        "The grass is g\nThe pass key is 95041. Remember it.\nreen. The sky is blue."
        "\nWhat is the pass key? The pass key is "
    )
    assert (prompt.key, prompt.start, prompt.depth) == ("95041", 31, 14 / 36)
    assert (prompt.example.source, prompt.example.target) == (byte_tokens(prompt.text), tuple("95041"))
    assert prompt.example.length == 120 and prompt.example.ends
