"""Checked files of a folder, put where a library finds them and nothing else."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from probe.files import check_plain


@contextlib.contextmanager
def staged(files: Sequence[Path], written: Mapping[str, Mapping[str, Any]]) -> Iterator[Path]:
    """A new folder for a library that opens whatever it finds: links to ``files``, and the JSON objects ``written``.

    What else lies beside those files, a pipe or a pickle, is not there. The folder is gone afterwards.

    Raises:
        ProbeError: for one of the files that is no plain file.
    """
    with tempfile.TemporaryDirectory(prefix="probe-") as name:
        folder = Path(name)
        for path in files:
            check_plain(path)
            try:
                os.symlink(path.resolve(), folder / path.name)
            except OSError:  # a system or a user without links
                shutil.copyfile(path, folder / path.name)
        for file, values in written.items():
            (folder / file).write_text(json.dumps(values), encoding="utf-8")
        yield folder
