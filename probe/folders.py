"""Folders that are whole at every moment: one takes the other's place in a single step."""

import contextlib
import ctypes
import errno
import functools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from probe.errors import ProbeError
from probe.files import beside

# What renameat2 and renamex_np call an exchange of two paths.
LINUX_EXCHANGE, MACOS_SWAP = 2, 2
LINUX_HERE = -100  # AT_FDCWD: relative paths begin at the current folder


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary folder, then put it at ``path`` in one step. An older folder there is replaced.

    On Linux and macOS the two folders are exchanged by one call of the system, so there is a whole folder at ``path``
    at every moment. Where a file system cannot do that, the older folder steps aside first. A process that is killed
    between these two steps leaves it under the name that ``restore`` looks for.

    Args:
        path: where the folder goes.
        write: writes the files into the folder that it is given.

    Raises:
        ProbeError: where ``path`` is a folder with files that the new one does not have. They are somebody else's.
    """
    path = Path(os.path.abspath(path))  # "." has no name that another folder could take
    path.parent.mkdir(parents=True, exist_ok=True)
    restore(path)
    temporary = beside(path)
    temporary.mkdir()
    try:
        write(temporary)
        _flush(temporary)
        if os.path.lexists(path):
            check_replaced(path, {each.name for each in temporary.iterdir()})
            _replace(path, temporary)
        else:
            os.rename(temporary, path)
    finally:
        _remove(temporary)  # empty-handed, unfinished, or by now the older folder


def check_replaced(path: Path, names: set[str]) -> None:
    """Refuse to replace a path by a folder of files with these names, where that would destroy other files.

    Raises:
        ProbeError: where ``path`` is no folder, or holds a file of another name.
    """
    if not path.is_dir():
        raise ProbeError(f"{path}: must be a new folder or an older one of the same kind, got a file")
    others = sorted(each.name for each in path.iterdir() if each.name not in names)
    if others:
        raise ProbeError(f"{path}: must be a new folder or an older one of the same kind, got one with {others[0]!r}")


def restore(path: Path) -> None:
    """Put an older folder back that had stepped aside when the process that was replacing it was killed. This happens
    only where a file system cannot exchange two folders."""
    older = _aside(path)
    if not older.is_dir():
        return
    if os.path.lexists(path):  # the new one had taken its place
        _remove(older)
    else:
        os.rename(older, path)


def _aside(path: Path) -> Path:
    path = Path(os.path.abspath(path))
    return path.with_name(f".{path.name}.replaced-by-position-probe")


def _replace(path: Path, temporary: Path) -> None:
    """Put a folder in the place of an older one, which then has the temporary name."""
    try:
        exchange(temporary, path)
        return
    except OSError as error:
        # What systems and file systems say that have no such call: ENOTSUP is EOPNOTSUPP on some.
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    os.rename(path, _aside(path))
    try:
        os.rename(temporary, path)
    finally:
        restore(path)


def exchange(one: Path, other: Path) -> None:
    """Exchange what is at two paths, in one step.

    Raises:
        OSError: ENOSYS where this system cannot, EINVAL where the file system cannot.
    """
    call = _exchange()
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(other))
    if call(os.fsencode(one), os.fsencode(other)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))


@functools.cache
def _exchange() -> Callable[[bytes, bytes], int] | None:
    """The system's call, if it has one. Python has no function for it."""
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(AttributeError):
        if sys.platform == "darwin":
            swap = library.renamex_np
            swap.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint)
            return lambda one, other: swap(one, other, MACOS_SWAP)
        rename = library.renameat2
        rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
        return lambda one, other: rename(LINUX_HERE, one, LINUX_HERE, other, LINUX_EXCHANGE)
    return None


def _flush(folder: Path) -> None:
    """Wait until the files of a folder are on the disk: a folder that is renamed before may hold empty ones after a
    loss of power."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def _remove(path: Path) -> None:
    """Remove a folder, or a link to one; nothing where there is none."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
