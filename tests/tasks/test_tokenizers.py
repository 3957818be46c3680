"""The oracles are the libraries themselves: tokenizers, sentencepiece and transformers' AutoTokenizer."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from released import make
from tokenized import END, byte_level, sentence_piece, texts
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from probe.errors import ProbeError
from probe.limits import limits
from probe.tasks import Example, TextVocabulary, read_tokenizer
from probe.tasks.byte_vocabulary import ByteVocabulary
from probe.tasks.tokenizers import shared_tokenizer

SOME = [*texts(3, seed=1), "", " ", "x", "\n\n  The key is 71523.\tfür 世界 🙂", "is 12345, 0", "<|endoftext|> </s>"]


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory):
    byte_level(folder := tmp_path_factory.mktemp("bytes"))
    return folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    return folder, sentence_piece(folder)


def test_ids_and_texts_are_those_of_tokenizer_json(bytes_folder):
    vocabulary = TextVocabulary(bytes_folder)
    tokenizer = Tokenizer.from_file(str(bytes_folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(bytes_folder)
    assert len(vocabulary) == len(theirs) == 400
    for text in SOME:
        ids = vocabulary.ids_of(text)
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids == vocabulary.ids_of(text.encode())
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert vocabulary.decode(ids) == theirs.convert_ids_to_tokens(ids)
        assert vocabulary.text(vocabulary.decode(ids)) == text.encode()
    assert list(vocabulary.ids_of_all(SOME)[2]) == vocabulary.ids_of(SOME[2])
    assert (vocabulary.bos, vocabulary.stop) == (theirs.bos_token_id, theirs.eos_token_id) == (399, 399)
    assert vocabulary.encode(vocabulary.tokens) == list(range(400))


def test_ids_are_those_of_tokenizer_model(pieces):
    folder, theirs = pieces
    vocabulary = TextVocabulary(folder)
    assert list(vocabulary.tokens) == [theirs.id_to_piece(i) for i in range(theirs.vocab_size())]
    assert (vocabulary.bos, vocabulary.stop) == (theirs.bos_id(), theirs.eos_id())
    for text in SOME[:-1]:
        assert vocabulary.ids_of(text) == theirs.encode(text)
        assert vocabulary.text(vocabulary.decode(vocabulary.ids_of(text))).decode() == text


def test_ids_are_those_of_vocab_json_and_merges(tmp_path):
    tokenizer = byte_level(tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    tokenizer.model.save(str(tmp_path / "parts"))
    (tmp_path / "parts" / "config.json").write_text('{"model_type": "gpt2"}')
    vocabulary = TextVocabulary(tmp_path / "parts")
    assert vocabulary.tokens[vocabulary.bos] == vocabulary.tokens[vocabulary.stop] == END
    for text in SOME[:-1]:
        assert vocabulary.ids_of(text) == tokenizer.encode(text).ids


def test_a_piece_stands_behind_other_text(bytes_folder, pieces):
    for folder in (bytes_folder, pieces[0]):
        vocabulary = TextVocabulary(folder)
        for before, text in (("the key", "\nThe key is 71523.\n"), ("key of", " a"), ("key", "  \n sky")):
            together = vocabulary.decode(vocabulary.ids_of(before + text))
            assert together == [*vocabulary.decode(vocabulary.ids_of(before)), *vocabulary.tokenize(text.encode())]
        assert vocabulary.tokenize(b"the key") == tuple(vocabulary.decode(vocabulary.ids_of("the key")))


def test_prompts_and_completions_have_no_separator(bytes_folder, tmp_path):
    vocabulary = read_tokenizer(str(bytes_folder))
    assert read_tokenizer(str(bytes_folder)) is vocabulary
    source, target = vocabulary.tokenize(" the pass key is"), vocabulary.tokenize(" 123")
    whole = vocabulary.ids_of(" the pass key is 123")
    for ends in (True, False):
        example = Example(source, target, 9, ends)
        assert vocabulary.prompt(example) + vocabulary.completion(example) == [399, *whole, *[399] * ends]
    byte_level(tmp_path, bos_token=None, eos_token=None)
    bare, example = TextVocabulary(tmp_path), Example(source, target, 9)
    assert (bare.bos, bare.eos, bare.stop) == (None, None, -1)
    assert bare.prompt(example) + bare.completion(example) == whole


GENERIC = {"tokenizer_class": "TokenizersBackend"}  # what transformers 5 writes where a class has no name of its own


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"bos_token": END}}, 399),
        ({"tokenizer_config.json": {"bos_token": {"content": "the", "lstrip": False, "__type": "AddedToken"}}}, "the"),
        ({"tokenizer_config.json": {"bos_token": None}, "config.json": {"bos_token_id": 3}}, None),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"bos_token": END}}, 399),
        ({"tokenizer_config.json": {"model_max_length": 9}, "config.json": {"model_type": "gpt2"}}, 399),  # as GPT-2's
        ({"tokenizer_config.json": GENERIC, "config.json": {"model_type": "llama", "bos_token_id": 1}}, None),
        ({"tokenizer_config.json": GENERIC, "config.json": {"model_type": "gpt2", "bos_token_id": 7}}, None),
        ({"config.json": {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}}, None),
        ({"config.json": {"model_type": "own", "bos_token_id": [7, 8]}}, None),
        ({"config.json": {"model_type": "qwen2", "bos_token_id": 3, "num_hidden_layers": 10**9}}, None),
        ({"config.json": {"bos_token_id": 7}}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_first_and_the_last_token_are_those_of_autotokenizer(tmp_path, files, expected):
    tokenizer = byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    expected = tokenizer.token_to_id(expected) if isinstance(expected, str) else expected
    vocabulary = TextVocabulary(tmp_path)
    assert vocabulary.bos == expected
    assert vocabulary.before == ("nothing" if expected is None else f"{vocabulary.tokens[expected]} (id {expected})")
    if "num_hidden_layers" not in files.get("config.json", {}):  # of which it would make a list
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert (vocabulary.bos, vocabulary.eos) == (theirs.bos_token_id, theirs.eos_token_id)


def test_what_transformers_saves_without_a_first_token_has_none(tmp_path):
    make(tmp_path, "llama", {"bos_token_id": 1, "eos_token_id": 2})
    tokenizer = byte_level(tmp_path / "own", bos_token=None, eos_token=None)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    vocabulary, theirs = TextVocabulary(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (vocabulary.bos, vocabulary.eos) == (None, None)
    assert vocabulary.prompt(Example(vocabulary.tokenize(" the"), (), 1)) == vocabulary.ids_of(" the")


def test_a_token_that_the_tokenizer_does_not_have_is_none(tmp_path):
    byte_level(tmp_path, bos_token="<s>")
    assert TextVocabulary(tmp_path).bos is None


def save(folder, model):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return TextVocabulary(folder)


def test_an_id_without_a_string_of_its_own_has_one(tmp_path):
    padded = save(tmp_path / "a", {"type": "WordLevel", "vocab": {"a": 0, "b": 3}, "unk_token": "a"})
    assert padded.tokens == ("a", "<id 1>", "<id 2>", "b") and len(padded) == 4
    assert padded.decode([3, 2, 9]) == ["b", "<id 2>", "<id 9>"]
    assert padded.text(["b", "<id 2>", "<id 9>"]) == b"b"
    assert padded.fits(4) and padded.fits(7) and not padded.fits(3) and padded.wanted == "at least 4 tokens"
    twice = save(tmp_path / "b", {"type": "Unigram", "unk_id": 0, "vocab": [["?", 0], ["a", -1], ["a", -2], ["b", -3]]})
    assert len(set(twice.tokens)) == 4 and twice.encode(twice.tokens) == [0, 1, 2, 3]
    assert {"?", "a", "b"} < set(twice.tokens)
    assert twice.encode(twice.decode(twice.ids_of("abba"))) == twice.ids_of("abba")
    with pytest.raises(ProbeError, match="a tokenizer with a string for every token was wanted, got 2 of 3"):
        save(tmp_path / "c", {"type": "WordLevel", "vocab": {"<id 1>": 0, "b": 2}, "unk_token": "b"})


def test_settings_for_single_texts_do_not_cut(tmp_path):
    tokenizer = byte_level(tmp_path)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(TextVocabulary(tmp_path).ids_of("71523 " * 20)) > 60
    assert TextVocabulary(tmp_path).ids_of("") == []


def test_bytes_are_a_vocabulary_too():
    vocabulary = ByteVocabulary()
    assert vocabulary.text(vocabulary.tokenize("a é\n".encode())) == "a é\n".encode()
    assert vocabulary.text(("<bos>", "a", "<eos>")) == b"a"
    assert vocabulary.fits(260) and not vocabulary.fits(261) and vocabulary.stop == 3


def test_models_that_share_a_tokenizer(tmp_path):
    for name in ("a", "b"):
        byte_level(tmp_path / name)
    byte_level(tmp_path / "more", vocab_size=420)
    byte_level(tmp_path / "bare", bos_token=None)
    (tmp_path / "none").mkdir()
    folders = {path.name: path for path in tmp_path.iterdir()}
    assert shared_tokenizer({name: folders[name] for name in "ab"}) == str(folders["a"])
    assert shared_tokenizer({"none": folders["none"]}) == shared_tokenizer({}) == ""
    for other in ("more", "bare", "none"):
        with pytest.raises(ProbeError, match=f"share a tokenizer were wanted, but 'a' and '{other}' make other tokens"):
            shared_tokenizer({name: folders[name] for name in ("a", "b", other)})


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path):
    with pytest.raises(ProbeError, match="nowhere: a folder with a tokenizer was wanted; there is no such folder"):
        TextVocabulary(tmp_path / "nowhere")
    with pytest.raises(ProbeError, match=r"a tokenizer was wanted \(tokenizer.json, vocab.json, .*\), there is none"):
        TextVocabulary(tmp_path)
    for name in ("tokenizer.json", "vocab.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text('{"a": 1\n')
        with pytest.raises(ProbeError, match="no tokenizer that can be read: .") as error:
            TextVocabulary(folder)
        assert "\n" not in str(error.value)


def test_no_code_of_a_folder_is_run(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "config.json").write_text('{"model_type": "own"}')
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ProbeError, match="no tokenizer that can be read: .*custom code"):
        TextVocabulary(tmp_path)
    assert not (tmp_path / "run").exists()


def test_tokenizers_are_imported_when_one_is_read(bytes_folder):
    script = f"""
import sys, probe.tasks
assert not {{"tokenizers", "transformers"}} & set(sys.modules)
probe.tasks.read_tokenizer({str(bytes_folder)!r})
assert "tokenizers" in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
LONG_STEPS = {
    "normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 30},
    "nested": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [DOUBLE] * 6}] * 5},
    "by a regular expression": DOUBLE | {"pattern": {"Regex": ""}, "content": "a" * 5000},
    "put before": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 100}] * 3},
    "bytes": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 30},
}


@pytest.mark.parametrize("step", LONG_STEPS)
def test_steps_that_make_a_text_very_long_are_refused_before_any_is_taken(step, bytes_folder, tmp_path):
    values = json.loads((bytes_folder / "tokenizer.json").read_text()) | {"normalizer": LONG_STEPS[step]}
    values["added_tokens"] = [token | {"normalized": True} for token in values["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ProbeError, match="must make a text at most 4096 times as long, got"):
        TextVocabulary(tmp_path)


def test_templates_and_decoders_that_repeat_are_refused(bytes_folder, tmp_path):
    values = json.loads((bytes_folder / "tokenizer.json").read_text())
    repeated = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 5000}
    long = {"post_processor": repeated | {"pair": [], "special_tokens": {}}}
    for change in (long, {"decoder": {"type": "Sequence", "decoders": [DOUBLE] * 30}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(values | change))
        with pytest.raises(ProbeError, match="times as long"):
            TextVocabulary(tmp_path)


def test_normal_steps_are_read(bytes_folder, tmp_path):
    values = json.loads((bytes_folder / "tokenizer.json").read_text())
    steps = [{"type": "NFKC"}, {"type": "Lowercase"}, DOUBLE | {"content": "b"}, {"type": "Prepend", "prepend": "x"}]
    values["normalizer"] = {"type": "Sequence", "normalizers": steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert TextVocabulary(tmp_path).ids_of("A banana") == theirs.encode("A banana", add_special_tokens=False).ids


def test_files_that_are_not_plain_or_too_large_are_refused(bytes_folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "vocab.json", "merges.txt"):
        folder = tmp_path / name
        folder.mkdir()
        if name not in ("tokenizer.json", "vocab.json"):
            (folder / "vocab.json").write_text('{"a": 0}')
        os.mkfifo(folder / name)
        with pytest.raises(ProbeError, match="must be a plain file, got a pipe"):
            TextVocabulary(folder)
    refused = pytest.raises(ProbeError, match="a tokenizer's file must have at most 1000 bytes")
    with limits(tokenizer_bytes=1000), refused:
        TextVocabulary(bytes_folder)
    (folder := tmp_path / "linked").mkdir()  # as in the hub's cache
    (folder / "tokenizer.json").symlink_to(bytes_folder / "tokenizer.json")
    assert len(TextVocabulary(folder)) == 400


def test_settings_name_no_other_file(tmp_path):
    (outside := tmp_path / "outside.json").write_text('{"b": 0}')
    (folder := tmp_path / "in").mkdir()
    tokenizer = byte_level(tmp_path / "whole")
    tokenizer.model.save(str(folder))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"vocab_file": str(outside), "tokenizer_file": "/x"}))
    assert TextVocabulary(folder).ids_of("the key") == tokenizer.encode("the key").ids


def test_a_tokenizer_that_has_changed_is_read_again(bytes_folder, tmp_path):
    folder = shutil.copytree(bytes_folder, tmp_path / "changing")
    before = read_tokenizer(str(folder))
    assert read_tokenizer(str(folder)) is before
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": before.tokens[5], "eos_token": None}))
    assert read_tokenizer(str(folder)).bos == 5
