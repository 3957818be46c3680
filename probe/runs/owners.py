"""A folder belongs to one command, which leaves a record there: a JSON file that says what the folder is for.

Another command is refused in that folder, and so is the same one with another record.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from probe.errors import ProbeError
from probe.files import read_json_object, write_text
from probe.runs.locks import alone


class Kind(NamedTuple):
    """What a command leaves in its folder."""

    record: str  #: the file that says what the folder is for
    writes: tuple[str, ...]  #: the files and folders that it writes there


_PAGE = ("rows.parquet", "report.html")

#: The commands that write into a folder, by name.
COMMANDS = {
    "study": Kind("study.json", ("models", "loaded", "rows", "figures", *_PAGE)),
    "sweep": Kind("sweep.json", ("models", "results")),
    "train": Kind("run.json", ("checkpoints", "final", "_digests", "log.jsonl")),
    "scale": Kind("scale.json", ("models", "rows", *_PAGE)),
    **{
        name: Kind(f"{name}.json", ("rows", *_PAGE))
        for name in ("measure", "examine", "compare", "fit", "perplexity", "passkey")
    },
}

#: Commands whose record must have the key "format", by which it is told from another file of that name. The others
#: compare the whole record with their settings.
_WITH_FORMAT = ("sweep", "measure", "compare", "fit", "perplexity", "passkey")


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
    if owner in _WITH_FORMAT and "format" not in read_json_object(folder / record):
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
    if found.get("format") != expected.get("format"):
        raise ProbeError(
            f"{folder} holds work of format {found.get('format')!r}, and this version of probe needs "
            f"{expected.get('format')!r}; choose another folder or remove it"
        )
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
