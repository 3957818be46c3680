"""The log of a run: one JSON object a line, of which a kill may leave half of the last."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from probe.config import check_number, check_size
from probe.files import open_plain

OnLog = Callable[[dict[str, Any]], None]  # of an object of the log


def newest_log_entry(folder: Path) -> dict[str, Any] | None:
    """The last whole entry in a run's log, while it is being written, too; None before the first."""
    path = folder / "log.jsonl"
    if not path.exists():
        return None
    return next((json.loads(line) for line in reversed(lines_of(path)) if logged_step(line) < math.inf), None)


def lines_of(path: Path) -> list[str]:
    """The lines of a log; bytes that are no UTF-8 are replaced."""
    with open_plain(path) as file:
        return file.read().decode("utf-8", "replace").split("\n")


def logged_step(line: str) -> float:
    """The step of an entry. Infinite for what is no entry: the half line that a kill leaves, or other text."""
    try:
        entry = json.loads(line)
        check_size("step", entry["step"])
        check_number("loss", entry["loss"], -math.inf)
    except (ValueError, RecursionError, TypeError, KeyError, IndexError):
        return math.inf
    return entry["step"]
