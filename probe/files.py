"""Files that are whole or not there: written beside their final name, then renamed."""

import contextlib
import errno
import json
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from probe.errors import ProbeError
from probe.limits import current

if TYPE_CHECKING:
    import pandas as pd

KINDS_OF_FILE = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path, then put the result at ``path`` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    write_file(path, lambda temporary: temporary.write_bytes(content))


def write_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """A safetensors file. Its library calls a full disk an error of its own kind; here it is the system's, as of any
    other file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def check_plain(path: str | Path) -> None:
    """Refuse a path that does not lead to a plain file, before a library opens it. A link to a plain file is one.

    Raises:
        ProbeError: where there is no file, or where there is a folder, a pipe, a device or a socket.
    """
    open_plain(path).close()


def open_plain(path: str | Path) -> BinaryIO:
    """A plain file, opened to read its bytes. A pipe or a device is refused: reading one may never come to an end.

    Raises:
        ProbeError: where there is no file, or where there is a folder, a pipe, a device or a socket.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits until somebody writes into it.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise ProbeError(f"{path}: no such file") from None
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EISDIR):  # a socket; on some systems a folder
            raise ProbeError(f"{path}: must be a plain file") from None
        raise
    kind = stat.S_IFMT(os.fstat(number).st_mode)
    if kind != stat.S_IFREG:
        os.close(number)
        raise ProbeError(f"{path}: must be a plain file, got {KINDS_OF_FILE.get(kind, 'something else')}")
    return os.fdopen(number, "rb")


def state_of(path: Path) -> tuple[str, int, int, int]:
    """What differs when a file has been changed or replaced: what was read of it is then to be read again."""
    found = path.stat()
    return str(path), found.st_ino, found.st_size, found.st_mtime_ns


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an error names the file.

    Stricter than JSON, which allows a key twice and strings that no file name or page can hold.
    """
    with open_plain(path) as file:
        content = file.read(current().json_bytes + 1)
    check_json_size(content, path)
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_each_once)
    except RecursionError:
        raise ProbeError(f"{path}: must be JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ProbeError(f"{path}: must be JSON: {error}") from None
    if not isinstance(values, dict):
        raise ProbeError(f"{path}: must be a JSON object, got {type(values).__name__}")
    return values


def check_json_size(content: bytes, where: object) -> None:
    """Refuse JSON that would take too much memory, before it is parsed.

    Args:
        content: the JSON. Every value but the first stands behind one of ``[{:,``, so these bound the number of values.
        where: what the error begins with.

    Raises:
        ProbeError: where it has more bytes than the limit ``json_bytes``, or may have more values than ``json_values``.
    """
    n_bytes, n_values = current().json_bytes, current().json_values
    if len(content) > n_bytes:
        raise ProbeError(f"{where}: must be JSON of at most {n_bytes} bytes, got more")
    if sum(map(content.count, (b"[", b"{", b":", b","))) > n_values:
        raise ProbeError(f"{where}: must be JSON of at most {n_values} values, got more")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"each key must be given once, got {name!r} again")
    for text in _strings([*values, *values.values()]):
        if not is_text(text):
            raise ValueError(f"Unicode text without NUL was wanted, got {text!r:.60}")
    return values


def _strings(values: list[Any]) -> Iterator[str]:
    """Those of a list and the lists in it; objects in it have been seen."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from _strings(value)


def is_text(text: str) -> bool:
    """Whether a string can be written to a file and be the name of one: no half of a surrogate pair, no NUL."""
    return (text.isascii() and "\0" not in text) or not re.search("[\0\ud800-\udfff]", text)


def write_rows(path: Path, rows: "pd.DataFrame", made_with: Mapping[str, str] | None = None) -> None:
    """Rows as parquet. ``made_with``, versions and the like, lies in the file and is the ``attrs`` of what is read."""
    rows = rows.copy(deep=False)
    rows.attrs = dict(made_with or {})
    write_file(path, lambda temporary: rows.to_parquet(temporary, index=False))


def read_rows(path: Path, columns: Sequence[str] | None = None) -> "pd.DataFrame":
    """The rows of a parquet file that this package wrote.

    Raises:
        ProbeError: where it is not whole: something else wrote there, or a disk lost it; where it is no plain file.
    """
    import pandas as pd

    check_plain(path)
    try:
        return pd.read_parquet(path, columns=None if columns is None else list(columns))
    except Exception as error:  # what is not whole is found by Arrow, by its JSON or by pandas, each in its own words
        if getattr(error, "errno", None) or isinstance(error, MemoryError):  # the system's: no such file, no permission
            raise
        raise ProbeError(f"{path}: not a whole parquet file; remove it, and what it held is made anew") from None


# The folders in which this process works, and for each the file in which it notes what it has begun to write there.
_NOTES: dict[Path, Path] = {}


@contextlib.contextmanager
def noting(folder: Path, notes: Path) -> Iterator[None]:
    """Inside, every temporary file or folder below ``folder`` is noted in the file ``notes`` before it is made, so that
    whoever works there after a crash removes exactly these."""
    folder = Path(os.path.abspath(folder))
    _NOTES[folder] = Path(os.path.abspath(notes))
    try:
        yield
    finally:
        del _NOTES[folder]


def beside(path: Path) -> Path:
    """A new name beside a path, for what is then renamed to it. It begins with a dot and ends so that no reader takes
    it for a result."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    whole = Path(os.path.abspath(temporary))
    for folder, notes in list(_NOTES.items()):
        if whole.is_relative_to(folder):
            notes.parent.mkdir(exist_ok=True)
            with open(notes, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{whole.relative_to(folder)}\0")
    return temporary
