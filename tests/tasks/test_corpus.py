import os

import numpy as np
import pytest
from tokenized import byte_level, write_texts

from probe.errors import ProbeError
from probe.tasks import TextVocabulary
from probe.tasks.byte_vocabulary import BYTE_TOKENS, byte_tokens
from probe.tasks.corpus import Corpus, read_corpus


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(rng.choice([*"abc é\n"], size=200 + 10 * i)), encoding="utf-8")
    (tmp_path / ".hidden").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


def test_the_standard_library_is_millions_of_bytes_on_every_machine():
    corpus = read_corpus("python")
    sizes = {split: corpus.size(split) for split in corpus.files}
    assert sum(sizes.values()) > 5_000_000
    assert sizes["train"] > 0.7 * sum(sizes.values()) > 0
    assert sizes["validation"] > 200_000 and sizes["test"] > 200_000
    assert "abc.py" in {file for files in corpus.files.values() for file in files}
    assert not any(
        {"site-packages", "test"}.intersection(file.split("/")) for files in corpus.files.values() for file in files
    )


def test_a_folder_is_split_by_file(folder):
    corpus = read_corpus(str(folder))
    files = [set(corpus.files[split]) for split in ("train", "validation", "test")]
    assert sum(map(len, files)) == 40 == len(set.union(*files))
    for split, names in corpus.files.items():
        assert [(folder / name).read_bytes() for name in names] == list(corpus.texts[split])
    total = sum(corpus.size(split) for split in corpus.files)
    assert 0.7 < corpus.size("train") / total < 0.9


@pytest.mark.parametrize("sizes", [(5, 5, 5), (1, 1, 1000), (1000, 1, 1), (1, 1000, 1), (1, 1, 1, 1000), (9,) * 7])
def test_every_split_has_a_file(tmp_path, sizes):
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_bytes(b"a" * size)
    corpus = read_corpus(str(tmp_path))
    assert all(corpus.files.values())
    assert sum(map(len, corpus.files.values())) == len(sizes)


def test_windows_do_not_overlap_and_draws_come_from_everywhere(tmp_path):
    texts = {"train": (bytes(range(100)), bytes(range(100, 130))), "validation": (b"",), "test": (b"xyz",)}
    corpus = Corpus("made", {}, texts)
    windows = corpus.windows("train", 10, 99, np.random.default_rng(0))
    assert sorted(windows) == [bytes(range(i, i + 10)) for i in range(0, 130, 10)]
    assert len(corpus.windows("train", 10, 4, np.random.default_rng(0))) == 4
    rng = np.random.default_rng(0)
    starts = [corpus.draw("train", 20, rng)[0] for _ in range(4000)]
    counts = np.bincount(starts, minlength=111)
    allowed = np.r_[np.arange(81), np.arange(100, 111)]
    assert set(starts) == set(allowed.tolist())
    expected = 4000 / len(allowed)
    assert np.sum((counts[allowed] - expected) ** 2 / expected) < 140  # chi², 91 degrees of freedom: 1e-3 above 140
    assert corpus.draw("train", 0, rng) == b""
    for broken in (lambda: corpus.draw("test", 4, rng), lambda: corpus.windows("test", 4, 1, rng)):
        with pytest.raises(ProbeError, match="made: a test file of 4 bytes was wanted, the longest has 3"):
            broken()


def test_a_corpus_in_tokens_is_tokenised_once(tmp_path, monkeypatch):
    byte_level(tmp_path / "tokenizer")
    vocabulary = TextVocabulary(tmp_path / "tokenizer")
    asked, ids_of_all = [], vocabulary.ids_of_all
    monkeypatch.setattr(vocabulary, "ids_of_all", lambda texts: asked.extend(texts) or ids_of_all(texts))
    in_bytes = read_corpus(write_texts(tmp_path / "texts"))
    corpus = in_bytes.in_tokens(vocabulary)
    wholes = [vocabulary.ids_of(text) for text in in_bytes.texts["test"]]
    asked.clear()
    assert corpus.size("test") == sum(map(len, wholes)) < in_bytes.size("test") / 2
    windows = corpus.windows("test", 50, 999, np.random.default_rng(0))
    expected = [whole[s : s + 50] for whole in wholes for s in range(0, len(whole) - 49, 50)]
    assert sorted(map(list, windows)) == sorted(expected)
    drawn = list(in_bytes.in_tokens(vocabulary).draw("test", 70, np.random.default_rng(0)))
    assert any(drawn == whole[s : s + 70] for whole in wholes for s in range(len(whole)))
    assert asked == list(in_bytes.texts["test"])  # nothing twice, and no other split
    longest = max(map(len, wholes))
    with pytest.raises(ProbeError, match=f"a test file of 9999 tokens was wanted, the longest has {longest}"):
        corpus.draw("test", 9999, np.random.default_rng(0))


def test_bytes_have_distinct_tokens():
    assert len(set(BYTE_TOKENS)) == 256
    assert byte_tokens("a é\n".encode()) == ("a", " ", "<0xC3>", "<0xA9>", "<0x0A>")


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(ProbeError, match="there is no such folder"):
        read_corpus(str(tmp_path / "nowhere"))
    with pytest.raises(ProbeError, match="at least 3 files that are not empty were wanted, got 0"):
        read_corpus(str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_bytes(b"ab\xff")
    with pytest.raises(ProbeError, match=r"b\.txt: text in UTF-8 was wanted, got byte 2 that is none"):
        read_corpus(str(tmp_path))


def test_links_are_followed_and_no_text_is_in_two_splits(tmp_path):
    """20 files, 17 of them links to files elsewhere, as in the hub's cache: 3 were read."""
    folder, elsewhere = tmp_path / "texts", tmp_path / "blobs"
    for i in range(20):
        place = (folder if i < 3 else elsewhere / "deep") / f"{i}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"text {i}")
        if i >= 3:
            (folder / f"{i}.txt").symlink_to(place)
    (folder / "folder").symlink_to(elsewhere)  # the same files, by another way
    (folder / "again.txt").symlink_to("0.txt")
    (folder / "up").symlink_to("..")
    (folder / "root").symlink_to("/")
    (folder / "nowhere").symlink_to("missing")
    os.mkfifo(folder / "pipe")
    corpus = read_corpus(str(folder))
    assert sorted(bytes(text).decode() for of in corpus.texts.values() for text in of) == sorted(
        f"text {i}" for i in range(20)
    )
    assert "0.txt" in [name for of in corpus.files.values() for name in of]


def test_files_that_come_meanwhile_are_seen(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    first = read_corpus(str(tmp_path))
    assert read_corpus(str(tmp_path)) is first  # kept in memory
    (tmp_path / "3.txt").write_text("text 3")
    assert sum(map(len, read_corpus(str(tmp_path)).files.values())) == 4
    (tmp_path / "0.txt").write_text("TEXT 0!")
    assert b"TEXT 0!" in [text for of in read_corpus(str(tmp_path)).texts.values() for text in of]
    assert read_corpus() is read_corpus()
