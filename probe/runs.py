"""The folder in which a command works: it belongs to one command, and one process works there at a time.

A command leaves a record in its folder, a JSON file. Another command is refused there, and so is the same one with
other settings where it would go on from what it finds.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from probe.errors import ProbeError
from probe.files import noting, read_json_object, write_text

LOCK = ".lock"
NOTES = ".unfinished"  # a folder in which every process at work notes the temporary files that it makes
UNLOCKED = "PROBE_WITHOUT_LOCK"  # a variable of the environment, for file systems that have no locks
TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")  # the names that ``probe.files.beside`` makes


class Kind(NamedTuple):
    """What a command leaves in its folder."""

    record: str  # the file that says what the folder is for
    writes: tuple[str, ...]  # the files and folders that it writes there


_PAGE = ("rows.parquet", "report.html")

#: The commands that write into a folder, by name.
COMMANDS = {
    "study": Kind("study.json", ("models", "loaded", "rows", "figures", *_PAGE)),
    "examine": Kind("examine.json", ("rows", *_PAGE)),
    "sweep": Kind("sweep.json", ("models", "results")),
    "train": Kind("run.json", ("checkpoints", "final", "_digests", "log.jsonl")),
    "scale": Kind("scale.json", ("models", "rows", *_PAGE)),
    **{name: Kind(f"{name}.json", _PAGE) for name in ("compare", "fit", "perplexity", "passkey")},
}

UNCOMPARED = ("sweep", "compare", "fit", "perplexity", "passkey")  #: commands that take a folder with other settings


@contextlib.contextmanager
def at_work(folder: Path, command: str) -> Iterator[None]:
    """Work in a folder that is this command's, or new. The caller writes the command's record there.

    Args:
        folder: made where it is missing.
        command: a name in ``COMMANDS``.

    Raises:
        ProbeError: where the folder is another command's, or another process works there. Nothing has been written.
    """
    check_free(folder, command)
    with alone(folder):
        check_free(folder, command)
        yield


def check_free(folder: Path, command: str) -> None:
    """Refuse a folder that lies in what a command made, and whatever ``check_owner`` refuses.

    Args:
        folder: where the command is to write.
        command: a name in ``COMMANDS``.

    Raises:
        ProbeError: where the folder is refused.
    """
    check_owner(folder, command)
    check_outside(folder)


def check_owner(folder: Path, command: str) -> None:
    """Refuse a folder that holds what another command made, or files of unknown origin that this command would
    overwrite.

    Args:
        folder: where the command is to write.
        command: a name in ``COMMANDS``.

    Raises:
        ProbeError: where the folder is refused.
    """
    owner = owner_of(folder)
    if owner not in (None, command):
        raise ProbeError(
            f"{folder} holds the work of `probe {owner}` ({COMMANDS[owner].record}); choose another folder"
        )
    record = COMMANDS[command].record
    # The other commands compare the whole record with their settings.
    if owner in UNCOMPARED and "format" not in read_json_object(folder / record):
        raise ProbeError(
            f"{folder / record} must be the record of `probe {command}`, got another file of that name; choose another "
            "folder"
        )
    for name in COMMANDS[command].writes if owner is None else ():
        if os.path.lexists(folder / name):
            raise ProbeError(
                f"{folder} holds {name!r}, which `probe {command}` would overwrite, and no {record} that says whose it "
                "is; choose another folder"
            )


def check_outside(folder: Path) -> None:
    """Refuse a folder inside one of those that a command made in its own folder.

    Raises:
        ProbeError: where the folder is in one.
    """
    whole = Path(os.path.realpath(folder))
    for inner, outer in zip((whole, *whole.parents), whole.parents, strict=False):
        owner = owner_of(outer)
        if owner is not None and inner.name in COMMANDS[owner].writes:
            raise ProbeError(f"{folder} lies in the work of `probe {owner}` in {outer}; choose another folder")


def check_output(path: Path) -> None:
    """Refuse a file that a command made in its own folder, as the place of something else.

    Raises:
        ProbeError: where the path is that of such a file, or in a folder of such files.
    """
    owner = owner_of(path.parent)
    if owner is not None and path.name in (COMMANDS[owner].record, *COMMANDS[owner].writes):
        raise ProbeError(f"{path} is a file of `probe {owner}`; choose another name")
    check_outside(path.parent)


def owner_of(folder: Path) -> str | None:
    """The command whose work a folder holds, by its record; None where there is no record."""
    return next((name for name, kind in COMMANDS.items() if os.path.lexists(folder / kind.record)), None)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is missing. The system releases the lock when the process ends,
    however it ends. What such a process had begun to write is then removed: the temporary files that it has noted.

    Raises:
        ProbeError: where another process is at work there, ``.lock`` is no plain file, or the file system has no locks.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    notes = folder / NOTES
    if os.path.lexists(notes) and (notes.is_symlink() or not notes.is_dir()):
        raise ProbeError(f"{notes}: must be a folder, for the notes of what is being written here; remove it")
    with _locked(folder):
        remove_unfinished(folder)
        try:
            with working_in(folder):
                yield
        finally:
            remove_unfinished(folder)
            if new and os.listdir(folder) == [LOCK]:  # nothing came of it
                (folder / LOCK).unlink()
                folder.rmdir()


def working_in(folder: str | Path) -> contextlib.AbstractContextManager[None]:
    """Inside, this process notes the temporary files that it makes in a folder. It is for the processes that work for
    the one that holds the lock."""
    return noting(Path(folder), Path(folder) / NOTES / f"{os.getpid()}-{secrets.token_hex(4)}")


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files and folders that processes noted in this folder, and the notes."""
    notes = folder / NOTES
    if notes.is_symlink() or not notes.is_dir():
        return
    base = Path(os.path.realpath(folder))
    for each in sorted(notes.iterdir()):
        if each.is_symlink() or not each.is_file():
            continue
        for line in each.read_text(encoding="utf-8", errors="surrogateescape").split("\0"):
            path = base / line
            # A note may come from elsewhere, in an archive: nothing is removed through a link or outside the folder.
            if TEMPORARY.fullmatch(path.name) and Path(os.path.realpath(path)) == path and path.is_relative_to(base):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        each.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's file is in it
        notes.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # only POSIX has such locks
        yield
        return
    if os.environ.get(UNLOCKED):
        yield
        return
    path = folder / LOCK
    try:
        # The file may come from elsewhere: no link is followed, nothing is truncated, no pipe is waited for.
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a folder, a socket
            raise ProbeError(f"{path}: must be a plain file, for the lock of this folder") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise ProbeError(f"{path}: must be a plain file, for the lock of this folder")
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.exists(path) or not os.path.samestat(os.fstat(number), os.stat(path)):
                raise BlockingIOError  # the process that held it has just removed it
        except BlockingIOError:
            raise ProbeError(
                f"{folder}: another process is at work in this folder; wait for it, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            raise ProbeError(
                f"{folder}: this file system has no locks ({error.strerror}); choose a folder on another disk, or set "
                f"{UNLOCKED}=1 if no other process works in this folder"
            ) from None
        yield
    finally:
        os.close(number)


def claim_folder(folder: Path, name: str, identity: dict[str, Any]) -> None:
    """Write into a new folder what it is for, or check that it is for that.

    Args:
        folder: the folder.
        name: of the record, a JSON file.
        identity: what the record says.

    Raises:
        ProbeError: where the record says something else. The error names the first difference.
    """
    path = folder / name
    expected = json.loads(json.dumps(identity))
    if not os.path.lexists(path):
        write_text(path, json.dumps(expected, indent=2) + "\n")
        return
    found = read_json_object(path)
    if found != expected:
        raise ProbeError(
            f"{folder} holds other work: {_first_difference(found, expected)}; choose another folder or remove it"
        )


def _first_difference(found: Any, expected: Any, where: str = "") -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*expected, *(k for k in found if k not in expected)]:
            if found.get(key) != expected.get(key):
                return _first_difference(found.get(key), expected.get(key), f"{where}.{key}" if where else key)
    return f"it was begun with {where} {found!r}, and this command says {expected!r}"
