"""Passkeys in the tokens of a released model."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenized import byte_level, sentence_piece, write_texts
from torch import nn

from probe.errors import ProbeError
from probe.tasks import make_task, read_tokenizer
from probe.tasks.corpus import read_corpus
from probe.tasks.passkey import SENTENCES
from probe.training import encode, predict
from probe.training.evaluation import context_length, new_tokens

KINDS = ("bytes", "pieces", "bare")
FILLERS = ({}, {"n_keys": 3, "train_length": 300, "test_length": 400}, {"filler": "sentences"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    byte_level(folder / "bytes")
    sentence_piece(folder / "pieces")
    byte_level(folder / "bare", bos_token=None, eos_token=None)
    return {kind: str(folder / kind) for kind in KINDS} | {"text": write_texts(folder / "text")}


@pytest.fixture(scope="module")
def tasks(folders):
    """A task by tokenizer and filler."""
    return {
        (kind, i): make_task("passkey", {"text": folders["text"], "tokenizer": folders[kind], **FILLERS[i]})
        for kind in KINDS
        for i in range(len(FILLERS))
    }


@settings(max_examples=60, deadline=None)
@given(
    which=st.tuples(st.sampled_from(KINDS), st.integers(0, len(FILLERS) - 1)), more=st.integers(0, 300),
    depth=st.floats(0, 1), seed=st.integers(0, 10**6), split=st.sampled_from(["train", "test"]),
)  # fmt: skip
def test_a_prompt_holds_its_key_once_where_it_says(tasks, which, more, depth, seed, split):
    task = tasks[which]
    vocabulary, length = task.vocabulary, task.least_length + more
    prompt = task.prompt(length, depth, np.random.default_rng(seed), split)
    example, key = prompt.example, prompt.key.encode()
    ids = vocabulary.prompt(example) + vocabulary.completion(example)
    assert len(ids) == example.length == length and not example.ends
    text = vocabulary.text(example.source)
    assert text == prompt.text and text.count(key) == 1 and text[prompt.start :].startswith(key)
    answered = vocabulary.text((*example.source, *example.target))
    assert answered == text.rstrip() + b" " + key and vocabulary.text(example.target).strip() == key
    # What stands before the sentence with the key, other sentences left out, is its share of the filler, in tokens.
    found = re.finditer(rb"\nThe pass key(?: of \w+)? is (\d{5})\. Remember it\.\n", text)
    told = {m[1]: (m.start(), vocabulary.tokenize(m[0])) for m in found}
    assert len(told) == task.n_keys
    asked = vocabulary.tokenize(re.search(rb"\nWhat is the pass key.*$", answered)[0])
    n_filler = length - (vocabulary.bos is not None) - len(asked) - sum(len(tokens) for _, tokens in told.values())
    before = round(prompt.depth * n_filler)
    assert prompt.depth == (before / n_filler if n_filler else 0) and abs(before - depth * n_filler) <= 0.5
    at = before + sum(len(tokens) for start, tokens in told.values() if start < told[key][0])
    assert example.source[at : at + len(told[key][1])] == told[key][1]


def test_the_keys_tokens_are_those_of_running_text(tasks):
    for kind in ("bytes", "pieces"):
        task = tasks[kind, 0]
        for seed in range(30):
            prompt = task.prompt(120, 0.5, np.random.default_rng(seed))
            whole = task.vocabulary.ids_of(f"What is the pass key? The pass key is {prompt.key}")
            ids = task.vocabulary.encode((*prompt.example.source, *prompt.example.target))
            assert whole[-15:] == ids[-15:]
        first = prompt.example.target[0]
        # GPT-2's tokens begin with the space; where that is a token of its own, as Llama's, it is part of the question.
        assert first[0] == "Ġ" if kind == "bytes" else prompt.example.target == tuple(prompt.key)


def test_what_is_said_is_read_as_digits(tasks):
    for kind in ("bytes", "pieces"):
        task = tasks[kind, 0]
        said = [
            task.said(task.vocabulary.tokenize(text)) for text in (" 71523", " 71523. Remember 4", " the 71523", "")
        ]
        assert said == ["71523", "71523", "", ""]
        assert task.said((*task.vocabulary.tokenize(" 715"), "<id 99999>")) == "715"
    assert make_task("passkey").said(("7", "1", "<eos>")) == ("7", "1", "<eos>")


@pytest.mark.parametrize("kind", KINDS)
def test_splits_are_of_their_lengths_and_their_files(tasks, folders, kind):
    task = tasks[kind, 0]
    splits = task.splits(n_train=20, n_validation=8, n_test=8, seed=1)
    data = encode(splits.train, task.vocabulary)
    assert data.lengths.tolist() == [e.length for e in splits.train]
    assert all(task.least_length <= e.length <= 256 for e in (*splits.train, *splits.validation))
    assert all(256 < e.length <= 512 for e in splits.test)
    assert context_length(data, splits.test, task) == max(e.length for e in splits.test)
    assert all(new_tokens(e, task) == len(e.target) for e in splits.test)
    corpus = read_corpus(folders["text"])
    for split, examples in (("train", splits.train), ("test", splits.test)):
        for e in examples:
            start = re.split(r"\nThe pass key is|\nWhat is", task.vocabulary.text((*e.source, *e.target)).decode())[0]
            # A cut may lie within a character.
            assert start.strip("\ufffd").encode() in b"\0".join(corpus.texts[split])


@pytest.mark.parametrize("kind", KINDS)
def test_plain_text_is_predicted_from_what_stands_before(tasks, kind):
    task = tasks[kind, 0]
    data, n = encode(task.looked_at(40, 6, seed=0), task.vocabulary), len(task.plain_prefix)
    assert data.tokens.shape == (6, 40) and (data.prompt_lengths == 1).all()
    assert task.plain_prefix == (() if kind == "bare" else (task.vocabulary.bos,))
    for row in data.tokens.tolist():
        assert tuple(row[:n]) == task.plain_prefix
        assert any(row[n:] == list(ids[i : i + 40 - n]) for ids in task.corpus.texts["test"] for i in range(len(ids)))


def test_sentences_go_round(tasks):
    for kind in KINDS:
        task = tasks[kind, 2]
        text = task.prompt(400, 1.0, np.random.default_rng(0)).text
        filler = re.split(rb"\nThe pass key", text)[0]
        assert len(filler) > 200 and (SENTENCES * 20).startswith(filler)


def test_a_model_with_more_rows_than_tokens_is_evaluated(tasks, make_decoder):
    task = tasks["bytes", 0]
    examples = task.splits(n_train=1, n_validation=6, n_test=1).validation
    decoder = make_decoder(d_vocab=len(task.vocabulary) + 5, n_ctx=300)
    nn.init.zeros_(decoder.final_norm.weight)
    nn.init.ones_(decoder.final_norm.bias)
    nn.init.ones_(decoder.head.weight[-1])  # the last row is said, whatever stands before
    rows = predict(decoder, examples, task.vocabulary, task=task)
    assert rows["prediction"].tolist() == [" ".join(["<id 404>"] * len(e.target)) for e in examples]
    assert not rows["correct"].any()


def test_a_tokenizer_that_loses_digits_is_refused(tmp_path, folders):
    (tmp_path / "tokenizer.json").write_text(
        '{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},'
        ' "model": {"type": "WordLevel", "vocab": {"?": 0, "key": 1}, "unk_token": "?"}}'
    )
    task = make_task("passkey", {"text": folders["text"], "tokenizer": str(tmp_path)})
    with pytest.raises(ProbeError, match="of 200 tokens that holds its key once was wanted, got none in 1,000 draws"):
        task.prompt(200, 0.5, np.random.default_rng(0))


def test_wrong_options_are_refused(folders, tmp_path):
    options = {"text": folders["text"], "tokenizer": folders["bytes"]}
    least = make_task("passkey", options).least_length
    with pytest.raises(ProbeError, match=f"train_length must be at least {least}, the prompt without filler, got 20"):
        make_task("passkey", {**options, "train_length": 20})
    with pytest.raises(ProbeError, match="a folder with a tokenizer was wanted; there is no such folder"):
        make_task("passkey", {**options, "tokenizer": str(tmp_path / "nowhere")})
    with pytest.raises(ProbeError, match="tokenizer of task 'passkey' must be a folder, got 3"):
        make_task("passkey", {**options, "tokenizer": 3})
    assert make_task("passkey", {"tokenizer": ""}) == make_task("passkey")
    assert read_tokenizer(folders["bytes"]) is make_task("passkey", options).vocabulary


@pytest.mark.parametrize("kind", ["", *KINDS], ids=["real bytes", *KINDS])
def test_the_tokens_of_the_key_are_found(kind, folders):
    tokenizer = folders[kind] if kind else ""
    task = make_task("passkey", {"text": folders["text"], "tokenizer": tokenizer, "train_length": 256})
    rng = np.random.default_rng(0)

    def spelled(ids):
        return task.vocabulary.text(task.vocabulary.decode(ids)).decode()

    for _ in range(5):
        prompt = task.prompt(200, None, rng)
        first, end = task.tokens_of_key(prompt)
        ids = task.vocabulary.prompt(prompt.example)
        assert spelled(ids[first:end]).strip(" .") == prompt.key
        # Without the first or the last of them some of the key is missing.
        assert prompt.key not in spelled(ids[first + 1 : end]) and prompt.key not in spelled(ids[first : end - 1])
