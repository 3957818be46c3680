"""The command for models that others trained."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_examine_command(commands: Any, add_device: Callable[[argparse.ArgumentParser], None]) -> None:
    """examine, among the other commands."""
    command = commands.add_parser("examine", help="released models, or ours, from end to end: one report")
    command.set_defaults(run=_examine)
    command.add_argument(
        "models", nargs="+", metavar="MODEL", help="as of `probe compare`; a hub name may be OWNER/MODEL@REVISION"
    )
    command.add_argument("--folder", default="runs/examine", help="where all goes (default: %(default)s)")
    command.add_argument("--text", metavar="FOLDER", help="texts (default: python, its standard library)")
    command.add_argument("--tokens", metavar="FILE", help="token ids, .npy, in place of texts")
    command.add_argument("--length", type=int, metavar="N", help="tokens of a sequence (default: 64)")
    command.add_argument("--sequences", type=int, metavar="N", help="how many (default: 64)")
    command.add_argument("--needles", type=int, metavar="N", help="prompts with a hidden key (default: 24; 0: none)")
    command.add_argument(
        "--ablate",
        action=argparse.BooleanOptionalAction,
        help="replace every head's pattern (default: if fast)",
    )
    command.add_argument("--seed", type=int, metavar="N")
    add_device(command)


def _examine(options: argparse.Namespace) -> int:
    from probe.errors import ProbeError
    from probe.study.examine import ExamineConfig, examine
    from probe.study.places import find_checkpoints

    names = ("text", "tokens", "length", "sequences", "needles", "ablate", "seed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    checkpoints, _ = find_checkpoints(options.models)
    for name, places in checkpoints.items():
        if len(places) > 1:
            raise ProbeError(f"{name}: one model was wanted, got {len(places)} seeds: probe compare and fit take them")
    folder = Path(options.folder)
    examine(
        {name: places[0].said for name, places in checkpoints.items()},
        folder,
        ExamineConfig(**given),
        device=options.device,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(folder / "report.html")
    return 0
