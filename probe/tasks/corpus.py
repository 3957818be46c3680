"""Text without a download: a folder's files, as bytes or as tokens, split by file."""

import functools
import hashlib
import os
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from probe.errors import ProbeError
from probe.files import open_plain, state_of
from probe.tasks.tokenizers import TextVocabulary

PYTHON = "python"  # in place of a folder: the sources of Python's standard library
SPLITS = ("train", "validation", "test")

# What of the standard library is left out: other people's packages, tests (not there on every machine) and bytecode.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """The texts of some files by split: no file is in two of them. A text is bytes, or an array of token ids."""

    name: str
    files: dict[str, tuple[str, ...]]
    texts: dict[str, tuple[Sequence[int], ...]]
    unit: str = "bytes"

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of the bytes of every file and of the split in which it is. Where the folder lies changes
        nothing."""
        digest = hashlib.sha256()
        for split, files in self.files.items():
            texts = self.texts.texts if isinstance(self.texts, _Tokenised) else self.texts
            for file, text in zip(files, texts[split], strict=True):
                digest.update(f"{split} {file} {len(text)}\n".encode())
                digest.update(bytes(text))
        return digest.hexdigest()

    def size(self, split: str) -> int:
        """How many bytes or tokens a split has."""
        return sum(map(len, self.texts[split]))

    @functools.lru_cache(maxsize=8)  # noqa: B019  (corpora live as long as the process)
    def in_tokens(self, vocabulary: TextVocabulary) -> "Corpus":
        """The same files as ids of a vocabulary. A split is tokenised when it is first asked for, each file once."""
        return Corpus(self.name, self.files, _Tokenised(self.texts, vocabulary), "tokens")

    def windows(self, split: str, length: int, n: int, rng: np.random.Generator) -> list[Sequence[int]]:
        """Up to n windows of so many bytes or tokens, none overlapping another, in an order drawn by ``rng``.

        Raises:
            ProbeError: where no file of the split is that long.
        """
        starts = [(i, s) for i, text in enumerate(self.texts[split]) for s in range(0, len(text) - length + 1, length)]
        if not starts:
            raise self._too_short(split, length)
        chosen = rng.permutation(len(starts))[:n]
        return [self.texts[split][i][s : s + length] for i, s in (starts[c] for c in chosen.tolist())]

    def draw(self, split: str, length: int, rng: np.random.Generator) -> Sequence[int]:
        """A window of so many bytes or tokens, every place in the split's files equally likely."""
        if length == 0:
            return self.texts[split][0][:0]
        rooms = self._rooms(split, length)
        at = int(rng.integers(rooms[-1]))
        i = int(np.searchsorted(rooms, at, side="right"))
        start = at - (int(rooms[i - 1]) if i else 0)
        return self.texts[split][i][start : start + length]

    @functools.lru_cache(maxsize=4096)  # noqa: B019  (corpora live as long as the process)
    def _rooms(self, split: str, length: int) -> np.ndarray:
        """How many windows of that length begin in the first file, in the first two, and so on."""
        rooms = np.cumsum([max(0, len(text) - length + 1) for text in self.texts[split]])
        if not rooms[-1]:
            raise self._too_short(split, length)
        return rooms

    def _too_short(self, split: str, length: int) -> ProbeError:
        longest = max(map(len, self.texts[split]))
        return ProbeError(f"{self.name}: a {split} file of {length} {self.unit} was wanted, the longest has {longest}")

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class _Tokenised(dict[str, tuple[Sequence[int], ...]]):
    """The texts of each split as ids, once they are asked for."""

    def __init__(self, texts: Mapping[str, tuple[Sequence[int], ...]], vocabulary: TextVocabulary):
        super().__init__()
        self.texts, self.vocabulary = texts, vocabulary

    def __missing__(self, split: str) -> tuple[Sequence[int], ...]:
        self[split] = found = tuple(self.vocabulary.ids_of_all([bytes(text) for text in self.texts[split]]))
        return found


def read_corpus(name: str = PYTHON) -> Corpus:
    """The corpus of a folder (all files under it, in UTF-8), or of Python's own standard library ("python").

    The files, in the order of a hash of their paths, are cut into eight tenths of the bytes for training, one for
    validation and one for testing, each of at least one file. What "python" is differs a little from one version of
    Python to another: 660 files and 11.8 million bytes in 3.11.

    Links to files and to folders are followed. A file that several names lead to is read once, under its own name if
    that is in the folder. Hidden files, those below hidden folders, and whatever is no plain file are left out. A
    corpus is kept in memory and read again when a file of the folder has changed.

    Args:
        name: of the folder, or "python".

    Raises:
        ProbeError: for a folder that is not there, holds fewer than three files that are not empty, or one that is no
            UTF-8 text; it names the file.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if name == PYTHON else Path(name)
    if not folder.is_dir():
        raise ProbeError(f"{name}: a folder of texts was wanted, or {PYTHON!r}; there is no such folder")
    if name == PYTHON:
        return _read_corpus(name, folder, ())
    return _read_corpus(name, folder.resolve(), tuple(map(state_of, _text_files(folder.resolve()))))


@functools.lru_cache(maxsize=8)
def _read_corpus(name: str, folder: Path, state: tuple[tuple[str, int, int, int], ...]) -> Corpus:
    """The corpus as it is now; ``state`` is that of its files, so that a changed one is read again."""
    texts = {}
    for path in _library_files(folder) if name == PYTHON else _text_files(folder):
        try:
            with open_plain(path) as file:
                text = file.read()
            text.decode("utf-8")
        except OSError as error:
            raise ProbeError(f"{path}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            if name == PYTHON:  # a handful of sources are in other encodings, as they say in their first line
                continue
            raise ProbeError(f"{path}: text in UTF-8 was wanted, got byte {error.start} that is none") from None
        if text:
            texts[path.relative_to(folder).as_posix()] = text
    if len(texts) < len(SPLITS):
        raise ProbeError(f"{name}: at least {len(SPLITS)} files that are not empty were wanted, got {len(texts)}")
    by_split = _split(texts)
    return Corpus(
        name,
        {split: tuple(files) for split, files in by_split.items()},
        {split: tuple(texts[file] for file in files) for split, files in by_split.items()},
    )


def _library_files(folder: Path) -> list[Path]:
    """The sources of the standard library. Links are left out: systems add files of their own by them."""
    paths = (path for path in sorted(folder.rglob("*.py")) if path.is_file() and not path.is_symlink())
    return [p for p in paths if not any(x.startswith(".") or x in _NOT_LIBRARY for x in p.relative_to(folder).parts)]


def _text_files(folder: Path) -> list[Path]:
    """The plain files below a folder, through links, each once: no text is in two splits."""
    found: list[Path] = []
    folders, links = [folder], list[Path]()
    seen: set[Path] = set()
    while folders or links:
        here = folders.pop() if folders else links.pop()  # folders first, so that files have their own names
        real = Path(os.path.realpath(here))
        if real in seen or (seen and folder.is_relative_to(real)):  # read already, or a link that leads out and back
            continue
        seen.add(real)
        try:
            names = os.listdir(here)
        except OSError as error:
            raise ProbeError(f"{here}: {error.strerror or error}") from None
        for path in [here / name for name in sorted(names, reverse=True) if not name.startswith(".")]:
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif path.is_file():
                found.append(path)
    once: dict[str, Path] = {}
    for path in sorted(found, key=lambda path: (path.is_symlink(), path)):
        once.setdefault(os.path.realpath(path), path)
    return sorted(once.values())


def _split(texts: dict[str, bytes]) -> dict[str, list[str]]:
    files = sorted(texts, key=lambda file: hashlib.blake2b(file.encode(), digest_size=8).digest())
    total, read = sum(map(len, texts.values())), 0
    by_split: dict[str, list[str]] = {split: [] for split in SPLITS}
    for i, file in enumerate(files):
        left = len(files) - i
        if left <= 2 and not by_split[SPLITS[-left]]:
            split = SPLITS[-left]
        else:
            split = SPLITS[0] if read < 0.8 * total or i == 0 else SPLITS[1] if read < 0.9 * total else SPLITS[2]
        by_split[split].append(file)
        read += len(texts[file])
    if not by_split["validation"]:  # one file at the end of the training part was larger than the next tenth
        by_split["validation"].append(by_split["test"].pop(0))
    return by_split
