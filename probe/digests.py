"""SHA-256 digests of finished files and checkpoints, kept beside them: what a command goes on from is what was written.

The digests of ``rows/probe-none.parquet`` are in ``rows/_digests/probe-none.parquet.sha256``, in the form that
``sha256sum --check`` reads. Readers of a folder of parquet files pass over a folder whose name begins with ``_``.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from probe.errors import ProbeError
from probe.files import open_plain, read_rows, write_file, write_text
from probe.limits import current

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "_digests"


def digest_file(path: Path) -> Path:
    """The file with the digests of what is at a path."""
    return path.parent / FOLDER / f"{path.name}.sha256"


def write_digests(path: Path, content: Path) -> None:
    """Write the digests of what will be at ``path``, and is still at ``content``: a file, or a folder of files."""
    files = {f"../{path.name}": content}
    if content.is_dir():
        files = {f"../{path.name}/{each.name}": each for each in sorted(content.iterdir())}
    write_text(digest_file(path), "".join(f"{sha256_of(file)}  {name}\n" for name, file in files.items()))


def check_digests(path: Path, names: Collection[str] = ()) -> bool:
    """Whether there are digests of what is at a path.

    Args:
        path: a file, or a folder of files.
        names: of the files of the folder that are to be checked.

    Raises:
        ProbeError: where a file has another digest than when it was written.
    """
    if not digest_file(path).exists():
        return False
    with open_plain(digest_file(path)) as file:
        lines = file.read(current().json_bytes).decode("utf-8", "replace").splitlines()
    kept = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in [f"../{path.name}/{each}" for each in names] or [f"../{path.name}"]:
        file_path = path.parent / name.removeprefix("../")
        if kept.get(name) != sha256_of(file_path):
            raise ProbeError(f"{file_path}: must be as it was written, got another SHA-256; remove {path}")
    return True


def write_finished_rows(path: Path, rows: "pd.DataFrame", made_with: dict[str, str] | None = None) -> None:
    """Write rows as parquet, and their digest, which is there before them."""
    rows = rows.copy(deep=False)
    rows.attrs = dict(made_with or {})

    def write(temporary: Path) -> None:
        rows.to_parquet(temporary, index=False)
        write_digests(path, temporary)

    write_file(path, write)


def read_finished_rows(path: Path) -> "pd.DataFrame":
    """The rows that ``write_finished_rows`` wrote.

    Raises:
        ProbeError: where there are none, or others.
    """
    if not check_digests(path):
        raise ProbeError(f"{path}: must be the rows of a finished stage, got a file without a digest; remove it")
    return read_rows(path)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a plain file, as 64 hexadecimal digits."""
    with open_plain(path) as file:
        digest = hashlib.sha256()
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
