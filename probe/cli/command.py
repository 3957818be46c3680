"""What every command is made of, and the options that several have."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from probe.config import MOST_SEED, check_size
from probe.errors import one_line

if TYPE_CHECKING:
    import pandas as pd


class Command(NamedTuple):
    """One command: what it is for, what it may be told, what it does.

    ``add`` gives a parser its options, and is called only where they are wanted: they come from what takes seconds to
    import. ``run`` returns the exit status. ``resumes`` says whether the same command goes on from where it was broken
    off.
    """

    help: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    resumes: bool = False


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")


def seed(text: str) -> int:
    """A seed as it is typed: one that every generator takes."""
    value = int(text)
    check_size("seed", value, least=0, most=MOST_SEED)
    return value


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="rows as JSON lines, and nothing else on stdout")


def tell_folder(options: argparse.Namespace, rows: "pd.DataFrame") -> int:
    """Print the rows, or where the report is; return the exit status: 1 where a measurement failed."""
    import pandas as pd

    if options.json:
        print_json(rows)
    else:
        print(Path(options.folder) / "report.html")
    failed = rows[rows["metric"] == "failed"] if "metric" in rows else rows[:0]
    for row in failed.to_dict("records"):
        what = row["measurement"] if pd.isna(row["model"]) else f"{row['measurement']} of {row['model']}"
        print(f"probe: {one_line(what)} failed: {one_line(row['reason'])}", file=sys.stderr)
    return 1 if len(failed) else 0


def print_json(rows: "pd.DataFrame") -> None:
    """The rows of a table on stdout, one JSON object each, all digits of a number: pandas' own JSON has 15 behind
    the point, few of a small error. What is missing, or no finite number, is null."""
    objects = rows.astype(object)
    objects = objects.where(objects.notna(), None)
    columns = [[_for_json(value) for value in objects[name]] for name in rows]
    for values in zip(*columns, strict=True):
        sys.stdout.write(json.dumps(dict(zip(rows, values, strict=True))) + "\n")
    sys.stdout.flush()


def _for_json(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value  # numpy's
    return None if isinstance(value, float) and not math.isfinite(value) else value
