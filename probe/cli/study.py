"""The commands that train: a whole study, and one decoder."""

import argparse
import functools
from pathlib import Path

from probe.cli.command import Command, add_device, add_json, tell_folder
from probe.cli.progress import progress
from probe.cli.settings import add_study_options, study_config


def _add_study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", default="runs/study", help="where everything goes (default: %(default)s)")
    presets = "default (minutes on a laptop), text (real text and keys), paper (the paper's size)"
    parser.add_argument("--preset", default="default", help=presets)
    parser.add_argument("--config", metavar="FILE", help="a JSON file with settings; flags go before it")
    parser.add_argument("--jobs", type=int, help="models worked on at once (default: one a core)")
    add_json(parser)
    add_device(parser)
    add_study_options(parser)


def _study(options: argparse.Namespace) -> int:
    from probe.study import run_study

    config, folder = study_config(options), Path(options.folder)
    with progress("study", config.training.steps) as shown:
        rows = run_study(config, folder, device=options.device, jobs=options.jobs, **shown._asdict())
    return tell_folder(options, rows)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", required=True, help="where the run goes")
    parser.add_argument("--encoding", default="none", help="how it sees position (default: %(default)s)")
    parser.add_argument("--keep-checkpoints", action="store_true", help="for `probe fit --over-training`")
    parser.add_argument("--preset", default="default", help="a study's; default, text or paper (default: %(default)s)")
    parser.add_argument("--config", metavar="FILE", help="a study's JSON file")
    add_device(parser)
    add_study_options(
        parser, without=("encodings", "load", "seeds", "trace_sequences", "trace_length", "verify_lengths")
    )


def _train(options: argparse.Namespace) -> int:
    from probe.study import train_one

    config, folder = study_config(options), Path(options.folder)
    with progress("train", config.training.steps) as shown:
        watch = functools.partial(shown.on_log, "train")
        keep = options.keep_checkpoints
        train_one(config, options.encoding, folder, device=options.device, keep_checkpoints=keep, on_log=watch)
    print(folder / "final")
    return 0


COMMANDS = {
    "study": Command("train, evaluate, probe, compare, verify: one report", _add_study, _study, resumes=True),
    "train": Command("train one decoder (also under `accelerate launch -m probe`)", _add_train, _train, resumes=True),
}
