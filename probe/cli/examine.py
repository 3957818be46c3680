"""The commands for models that others trained."""

import argparse
import sys
from pathlib import Path

from probe.cli.command import Command, add_device, add_json, print_json, seed, tell_folder
from probe.cli.progress import progress


def _add_examine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="as of `probe compare`; a hub name may be OWNER/MODEL@REVISION"
    )
    parser.add_argument("--folder", default="runs/examine", help="where all goes (default: %(default)s)")
    parser.add_argument("--text", metavar="FOLDER", help="texts (default: python, its standard library)")
    parser.add_argument("--tokens", metavar="FILE", help="token ids, .npy, in place of texts")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a sequence (default: 64)")
    parser.add_argument("--sequences", type=int, metavar="N", help="how many (default: 64)")
    parser.add_argument("--needles", type=int, metavar="N", help="prompts with a hidden key (default: 24; 0: none)")
    parser.add_argument(
        "--ablate",
        action=argparse.BooleanOptionalAction,
        help="replace every head's pattern (default: if fast)",
    )
    parser.add_argument("--seed", type=seed, metavar="N", help="of what is drawn (default: 0)")
    add_json(parser)
    add_device(parser)


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
    with progress("examine") as shown:
        rows = examine(
            {name: places[0].said for name, places in checkpoints.items()},
            folder,
            ExamineConfig(**given),
            device=options.device,
            say=shown.say,
            on_progress=shown.on_progress,
        )
    return tell_folder(options, rows)


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check",
        metavar="FOLDER",
        help="load this model (or hub name), compare it with the original and print what holds; measure nothing",
    )
    add_json(parser)
    add_device(parser)


def _models(options: argparse.Namespace) -> int:
    from probe.models.open.kinds import KINDS_OF
    from probe.models.pretrained import released_models

    if options.check is not None:
        return _check_model(options)
    rows = released_models()
    if options.json:
        print_json(rows)
    else:
        print(f"Checked with transformers {KINDS_OF}. Other kinds of decoders are checked when they are loaded.\n")
        widths = [max(map(len, [name, *rows[name]])) for name in rows]
        for row in [tuple(rows), *rows.itertuples(index=False)]:
            print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _check_model(options: argparse.Namespace) -> int:
    import pandas as pd

    from probe.errors import ProbeError, one_line
    from probe.models.checkup import checkup
    from probe.models.hub import find_folder

    folder = find_folder(options.check)
    try:
        said = checkup(folder, options.device)
    except ProbeError as error:
        print(f"probe: {one_line(error)}", file=sys.stderr)
        return 1
    if options.json:
        print_json(pd.DataFrame([said]))
    else:
        width = max(map(len, said))
        for name, value in said.items():
            print(f"{name:{width}}  {value}")
    return 0


COMMANDS = {
    "examine": Command("released models, or ours, from end to end: one report", _add_examine, _examine, resumes=True),
    "models": Command("which released models can be loaded, and how; what holds of one", _add_models, _models),
}
