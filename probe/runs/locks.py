"""One process at a time works in a folder, and what a killed one had begun to write is removed."""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from probe.errors import ProbeError
from probe.files import noting

LOCK = ".lock"  #: the file whose lock the process at work holds
NOTES = ".unfinished"  #: a folder in which every process at work notes the temporary files that it makes
UNLOCKED = "PROBE_WITHOUT_LOCK"  #: a variable of the environment, for file systems that have no locks
TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")  # the names that ``probe.files.beside`` makes


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
