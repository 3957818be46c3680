"""Files that are whole or not there: written beside their final name, then renamed."""

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from probe.errors import ProbeError


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary path, then put the result at ``path`` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary folder, then put it at ``path``; a folder that stands there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        write(temporary)
        old = _beside(path)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an error names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ProbeError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ProbeError(f"{path}: must be JSON: {error}") from None
    if not isinstance(values, dict):
        raise ProbeError(f"{path}: must be a JSON object, got {type(values).__name__}")
    return values


def _beside(path: Path) -> Path:
    # A leading dot and an ending that no reader looks for: what a crash leaves is never taken for a result.
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def claim_folder(folder: Path, name: str, identity: dict[str, Any]) -> None:
    """Write into a new folder what it is for, or check that it is for that.

    Raises:
        ProbeError: where the file ``name`` in the folder says something else; it names the first difference.
    """
    path = folder / name
    wanted = json.loads(json.dumps(identity))
    if not path.exists():
        write_text(path, json.dumps(wanted, indent=2) + "\n")
        return
    found = read_json_object(path)
    if found != wanted:
        raise ProbeError(
            f"{folder} holds other work: {_first_difference(found, wanted)}; take another folder or remove it"
        )


def _first_difference(found: Any, wanted: Any, where: str = "") -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(k for k in found if k not in wanted)]:
            if found.get(key) != wanted.get(key):
                return _first_difference(found.get(key), wanted.get(key), f"{where}.{key}" if where else key)
    return f"{where} is {found!r} there, and {wanted!r} was wanted"
