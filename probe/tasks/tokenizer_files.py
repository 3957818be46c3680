"""The files of a released model's tokenizer, read within bounds of size, time and memory, and without any code of
theirs."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import ProbeError
from probe.files import open_plain, read_json_object
from probe.limits import current
from probe.staged import staged

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
# What tokenizers are made of where that file is missing; transformers knows how.
PARTS = ("vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
BESIDE = ("merges.txt", "added_tokens.json")  # read along with them
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")  # where special tokens are named, the first that does


# By how much a step may lengthen a text, by its type, where its options don't say.
GROWTH = {"ByteLevel": 4, "Precompiled": 18, "NFKC": 18, "NFKD": 18, "NFC": 3, "NFD": 4, "BertNormalizer": 3}
STEPS = ("normalizer", "pre_tokenizer", "post_processor"), ("decoder",)  # on the way to ids, and back
MEMBERS = ("normalizers", "pretokenizers", "processors", "decoders")  # of a sequence of steps


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds what a tokenizer is made of."""
    return any((Path(folder) / name).is_file() for name in (TOKENIZER_FILE, *PARTS))


def files_of(folder: Path) -> list[Path]:
    """The files of a folder that a tokenizer depends on."""
    names = (TOKENIZER_FILE, *PARTS, *BESIDE, *SETTINGS, "config.json")
    return [folder / name for name in names if (folder / name).is_file()]


def tokenizer_digest(folder: str | Path) -> str:
    """The SHA-256 of the files of a folder that a tokenizer depends on. Where the folder lies changes nothing."""
    digest = hashlib.sha256()
    for path in files_of(Path(folder)):
        with open_plain(path) as file:
            content = file.read()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def read_tokenizer_of(folder: Path) -> tuple["Tokenizer", int | None, int | None]:
    """A folder's tokenizer, and the ids in front of and behind a text, None where there is no such token.

    Raises:
        ProbeError: for a folder that is not there, holds no tokenizer, or one that cannot be read without code or
            within bounds.
    """
    if not folder.is_dir():
        raise ProbeError(f"{folder}: a folder with a tokenizer was wanted; there is no such folder")
    path = folder / TOKENIZER_FILE
    if not any(os.path.lexists(folder / name) for name in (TOKENIZER_FILE, *PARTS)):
        raise ProbeError(f"{folder}: a tokenizer was wanted ({', '.join((TOKENIZER_FILE, *PARTS))}), there is none")
    if not os.path.lexists(path):
        return _made(folder)
    from tokenizers import Tokenizer

    content = _read_within_bounds(path)
    _check_growth(path, content)
    with read_by_library(f"{path}: no tokenizer that can be read"):
        tokenizer = Tokenizer.from_buffer(content)
    tokens = _special_tokens(folder)
    if not {"bos_token", "eos_token"} <= tokens.keys():
        # Where the files say nothing, the class that transformers takes for such a folder may: GPT-2's has tokens of
        # its own. The ids in config.json are those of generation, and often a class's own numbers.
        made = _by_transformers(folder, [path], code=False)
        tokens = {name: getattr(made, name) for name in ("bos_token", "eos_token")} | tokens
    bos, eos = (
        tokenizer.token_to_id(token) if isinstance(token := tokens[name], str) else None
        for name in ("bos_token", "eos_token")
    )
    return tokenizer, bos, eos


@contextlib.contextmanager
def read_by_library(what: str) -> Iterator[None]:
    """Its errors as ours. It checks little of a file, and where that shows it may panic, which is no ``Exception``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ProbeError(f"{what}: {_line(error)}") from None


def _read_within_bounds(path: Path) -> bytes:
    most = current().tokenizer_bytes
    with open_plain(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ProbeError(f"{path}: a tokenizer's file must have at most {most} bytes, got more")
    return content


def _check_growth(path: Path, content: bytes) -> None:
    """Refuse steps that make a text many times as long: thirty that double it make gigabytes of a word."""
    most = current().tokenizer_growth
    try:
        values = json.loads(content)
        for steps in STEPS:
            growth = math.prod(_growth(values.get(name)) for name in steps)
            if not growth <= most:
                what = f"{path}: {' and '.join(steps)} must make a text at most {most} times as long"
                raise ProbeError(f"{what}, got {growth:.3g}")
    except ProbeError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ProbeError(f"{path}: no tokenizer that can be read: {_line(error)}") from None


def _growth(step: Any) -> float:
    """By how much a step, with all steps in it, may lengthen a text."""
    if not isinstance(step, dict):
        return 1.0
    if step.get("type") == "Sequence":
        return math.prod(_growth(member) for name in MEMBERS for member in step.get(name) or ())
    if step.get("type") == "Replace":
        pattern = step["pattern"].get("String", "")  # a regular expression may match the empty string
        return max(1.0, len(step["content"]) / len(pattern)) if pattern else 1.0 + len(step["content"])
    if step.get("type") == "Prepend":
        return 1.0 + len(step["prepend"])
    if step.get("type") == "TemplateProcessing":
        return float(max(len(step["single"]), 1))
    return float(GROWTH.get(step.get("type", ""), 1))


def _special_tokens(folder: Path) -> dict[str, Any]:
    """The first and the last token of texts, where the folder's settings name them or say that there is none."""
    found: dict[str, Any] = {}
    for path in (folder / file for file in SETTINGS):
        values = read_json_object(path) if os.path.lexists(path) else {}
        for name in ("bos_token", "eos_token"):
            if name in values:
                found.setdefault(name, _content(values[name]))
    return found


def _content(token: Any) -> Any:
    """A token as a string, which may be written with its options."""
    return token.get("content") if isinstance(token, dict) else token


def _made(folder: Path) -> tuple["Tokenizer", int | None, int | None]:
    files = [folder / name for name in (*PARTS, *BESIDE) if os.path.lexists(folder / name)]
    for path in files:
        _read_within_bounds(path)
    made = _by_transformers(folder, files, code=True)
    tokenizer = getattr(made, "backend_tokenizer", None)
    if tokenizer is None:
        raise ProbeError(
            f"{folder}: a tokenizer that can be a {TOKENIZER_FILE} was wanted, got a {type(made).__name__}"
        )
    return tokenizer, made.bos_token_id, made.eos_token_id


def _by_transformers(folder: Path, files: Sequence[Path], code: bool) -> Any:
    """What ``AutoTokenizer`` makes of these files of a folder and of its settings. It is shown nothing else, no path to
    other files, and no number that it would make a list of.

    Args:
        code: whether code that the settings name counts, so that they are refused.

    Raises:
        ProbeError: where it makes nothing, or would have to run code.
    """
    from transformers import AutoTokenizer

    settings = {}
    for name in (*SETTINGS, "config.json"):
        if not os.path.lexists(folder / name):
            continue
        values = read_json_object(folder / name)
        if name == "config.json":  # which says of what kind the model is
            values = {key: values[key] for key in ("model_type", "tokenizer_class") if key in values}
        settings[name] = {
            key: _content(value) if key.endswith("_token") else value
            for key, value in values.items()
            if not key.endswith("_file") and not _is_large(value) and (code or key != "auto_map")
        }
    with staged(files, settings) as place:
        try:
            return AutoTokenizer.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of every kind: files are missing or broken, or it would have to run code
            line = _line(error).replace(str(place), str(folder))
            raise ProbeError(f"{folder}: no tokenizer that can be read: {line}") from None


def _is_large(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) > 2**16


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
