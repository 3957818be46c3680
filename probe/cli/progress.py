"""Progress on the command line: bars on stderr with the time left, where that is a terminal; else lines, as ever."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from probe.errors import printable
from probe.progress import OnProgress, untold

REDRAWN = 4  # times a second
AVERAGED = 3600.0  # seconds over which the speed is taken: stages are few and of different lengths


class Shown(NamedTuple):
    """How work is shown that is going on."""

    say: Callable[[str], None]  # a line
    on_progress: OnProgress
    on_log: Callable[[str, dict[str, Any]], None]  # the entry of a training's log, by the name of what is trained


@contextlib.contextmanager
def progress(what: str, training_steps: int = 0) -> Iterator[Shown]:
    """Show how far a command is, and each training of so many steps that it tells of.

    Until the command knows how much there is to do, the bar only moves. Where stderr is no terminal lines are printed
    and nothing else, and nothing is imported for it.
    """
    if not _is_shown():
        yield Shown(lambda line: print(printable(line), file=sys.stderr, flush=True), untold, lambda name, entry: None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        *(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}")),
    )
    console = Console(stderr=True, highlight=False)
    # stdout is left as it is: rows that go into a pipe from there must not be taken onto the terminal.
    options: dict[str, Any] = {
        "redirect_stdout": False,
        "refresh_per_second": REDRAWN,
        "speed_estimate_period": AVERAGED,
    }
    with Progress(*columns, console=console, **options) as bars:
        tasks = {what: bars.add_task(what, total=None, note="")}
        begun = False

        def on_progress(done: float, total: float) -> None:
            nonlocal begun
            if begun:
                bars.update(tasks[what], total=total, completed=done)
            else:  # what an earlier run has done is no part of the speed
                reset: Callable[..., None] = bars.reset  # rich asks for whole numbers there, and takes any
                reset(tasks[what], total=total, completed=done)
                begun = True

        def on_log(name: str, entry: dict[str, Any]) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(printable(name), total=training_steps, note="")
            note = f"loss {entry['loss']:.4f}"
            bars.update(tasks[name], total=training_steps, completed=entry["step"], note=note)

        yield Shown(lambda line: bars.console.print(printable(line), markup=False, soft_wrap=True), on_progress, on_log)


def _is_shown() -> bool:
    """Whether stderr is a terminal that can move its cursor; one of several processes of a training shows it."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and os.environ.get("LOCAL_RANK", "0") == "0"
