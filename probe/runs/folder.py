"""A folder of one run of a command: what it measured so far is kept there, and belongs to what it was measured of."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.digests import check_digests, read_finished_rows, write_finished_rows
from probe.errors import ProbeError
from probe.files import write_rows, write_text
from probe.limits import current
from probe.runs.owners import COMMANDS, at_work, claim_folder

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 3  #: of the records and rows that commands leave in their folders


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run of a command, whose lock this process holds.

    A run is known by its identity: the digests of the weights and of the tokens, every setting that changes a number,
    and those limits, where they are changed, that decide what is measured. The record in the folder holds it. A stage
    is a table that is measured once: its rows are in ``rows/<name>.parquet``, with a digest beside them, and are read
    when the same run is started again.
    """

    path: Path  #: where it is
    command: str  #: a name in ``COMMANDS``

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: str | Path, command: str, identity: Mapping[str, Any]) -> Iterator["RunFolder"]:
        """Work in a folder that is new, or holds the same run.

        Args:
            path: of the folder, which is made where it is missing.
            command: a name in ``COMMANDS``.
            identity: what the run is of, as JSON has it.

        Raises:
            ProbeError: where the folder holds another command's work, or a run of another identity or format; or
                another process works there. Nothing has been written.
        """
        path, record = Path(path), Path(path) / COMMANDS[command].record
        with at_work(path, command):
            new = not record.exists()
            decisive = {name: value for name, value in current().changed().items() if name.startswith("dense_")}
            limited = {"limits": decisive} if decisive else {}
            claim_folder(path, record.name, {"format": FORMAT, **identity, **limited})
            try:
                yield cls(path, command)
            finally:
                if new and not any((path / name).exists() for name in COMMANDS[command].writes):
                    record.unlink(missing_ok=True)  # nothing came of it

    def file_of(self, stage: str) -> Path:
        """Where the rows of a stage are, once it is finished."""
        return self.path / "rows" / f"{stage}.parquet"

    def has(self, stage: str) -> bool:
        """Whether a stage is finished. Rows without a digest are not: nobody knows what measured them.

        Raises:
            ProbeError: where its rows are not those that were written.
        """
        return self.file_of(stage).exists() and check_digests(self.file_of(stage))

    def measure(self, stage: str, measure: Callable[[], "pd.DataFrame"]) -> bool:
        """Measure a stage and keep its rows, unless it is finished. Return whether there was anything to do."""
        if self.has(stage):
            return False
        write_finished_rows(self.file_of(stage), measure())
        return True

    def rows(self, stage: str) -> "pd.DataFrame":
        """The rows of a finished stage.

        Raises:
            ProbeError: where it is not finished, or its rows are not those that were written.
        """
        if not self.file_of(stage).exists():
            raise ProbeError(f"{self.file_of(stage)}: no such file; the run has not come to that stage")
        return read_finished_rows(self.file_of(stage))

    def finish(self, rows: "pd.DataFrame", page: str, environment: Mapping[str, str]) -> None:
        """Write all rows and the report.

        Args:
            rows: all that was measured.
            page: the report as HTML.
            environment: what the rows were made with, kept in the attributes of ``rows.parquet``.
        """
        write_rows(self.path / "rows.parquet", rows, environment)
        write_text(self.path / "report.html", page)
