"""The commands for decoders that there are: their attention, their heads, the position in their hidden states."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from probe.cli.command import Command, add_device, add_json, print_json
from probe.cli.progress import progress
from probe.cli.settings import add_study_options, study_config
from probe.options import words

if TYPE_CHECKING:
    from torch import nn

    from probe.study import StudyConfig, TracedSequences
    from probe.study.places import Place


Add = Callable[[argparse.ArgumentParser], None]


def _of_models(own: Add) -> Add:
    """A command's own options, and those that all of these have."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "models",
            nargs="+",
            metavar="MODEL",
            help="a study's folder (all of its models), a checkpoint's folder, or NAME=FOLDER,… (seeds of one model)",
        )
        own(parser)
        parser.add_argument(
            "--text", metavar="FOLDER", help="texts (default for models with a tokenizer: python, its standard library)"
        )
        parser.add_argument(
            "--tokens", metavar="FILE", help="token ids, .npy, in place of texts or a task's held-out sequences"
        )
        parser.add_argument("--preset", default="default", help="a study's, whose task it is (default: %(default)s)")
        parser.add_argument("--config", metavar="FILE", help="a study's JSON file")
        add_json(parser)
        add_device(parser)
        add_study_options(parser, only=("task", "task_options", "trace_sequences", "trace_length", "seed"))

    return add


def _find(options: argparse.Namespace) -> "tuple[dict[str, list[Place]], StudyConfig]":
    """Where the models are, by name, and the settings of a study. What is to be fetched is, and shows how far it is."""
    from probe.study.places import find_checkpoints

    checkpoints, study = find_checkpoints(options.models)
    return checkpoints, study_config(options, study)


def _load(
    options: argparse.Namespace, checkpoints: "Mapping[str, Sequence[Place]]", config: "StudyConfig"
) -> "tuple[dict[str, list[nn.Module]], TracedSequences, int]":
    """The models by name, the sequences on which they are looked at, and a seed."""
    from probe.device import find_device
    from probe.study.places import load_all
    from probe.study.texts import sequences_for

    models = load_all(checkpoints, str(find_device(options.device)))
    return models, sequences_for(models, checkpoints, config, tokens=options.tokens, text=options.text), config.seed


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", default="runs/compare", help="where rows and report go (default: %(default)s)")


def _compare(options: argparse.Namespace) -> int:
    from probe.study.checkpoints import compare_checkpoints

    folder, found = Path(options.folder), _find(options)
    with progress("compare") as shown:
        models, traced, seed = _load(options, *found)
        told = {"command": options.typed, "say": shown.say, "on_progress": shown.on_progress}
        rows = compare_checkpoints(models, traced, folder, seed=seed, **told)
    if options.json:
        print_json(rows)
    else:
        print(folder / "report.html")
    return 0


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", default="runs/fit", help="where rows and report go (default: %(default)s)")
    parser.add_argument("--sites", type=words, metavar="SITE,…", help="TransformerLens names (default: all)")
    parser.add_argument(
        "--targets", type=words, metavar="NAME,…", help="what is read (default: position, log, inverse)"
    )
    parser.add_argument("--fitted-length", type=int, metavar="N", help="fit to N tokens and score on up to 4 N as well")
    parser.add_argument("--over-training", action="store_true", help="probes at every checkpoint that the runs kept")


def _fit(options: argparse.Namespace) -> int:
    import pandas as pd

    from probe.study.checkpoints import fit_checkpoints

    folder, (checkpoints, config) = Path(options.folder), _find(options)
    runs = {name: places[0].folder.parent for name, places in checkpoints.items()} if options.over_training else {}
    given = {name: getattr(options, name) for name in ("sites", "targets") if getattr(options, name)}
    with progress("fit") as shown:
        models, traced, seed = _load(options, checkpoints, config)
        rows = fit_checkpoints(
            models,
            traced,
            folder,
            fitted_length=options.fitted_length,
            over_training=runs,
            seed=seed,
            command=options.typed,
            on_progress=shown.on_progress,
            **given,
        )
    if options.json:
        print_json(rows)
        return 0
    fit = rows[rows["measurement"] == "fit"]
    found = fit[(fit["control"] == "none") & (fit["metric"] == "r2")].assign(what="r2")
    beside = fit[fit["metric"] == "selectivity"].assign(what=lambda each: "less " + each["control"])
    table = pd.concat([found, beside]).pivot_table(
        index=["encoding", "site", "target"], columns="what", values="value", sort=False
    )
    print(table.rename_axis(columns=None).to_string(float_format=lambda x: f"{x:.3f}"))
    print(folder / "report.html")
    return 0


def _add_census(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head-detector", action="store_true", help="TransformerLens's scores beside them")


def _census(options: argparse.Namespace) -> int:
    import pandas as pd

    from probe.attention import census, census_table
    from probe.progress import Steps

    rows, found = [], _find(options)
    with progress("census") as shown:
        models, traced, seed = _load(options, *found)
        steps = Steps(sum(map(len, models.values())), shown.on_progress)
        settings = {"scored": traced.scored, "head_detector": options.head_detector, "seed": seed}
        for name, decoders in models.items():
            for replica, decoder in enumerate(decoders):
                counted = census(decoder, traced.tokens, **settings, on_progress=steps.within)
                rows.append(counted.assign(model=name, replica=replica, data=traced.data))
                steps.step()
    found = pd.concat(rows, ignore_index=True)
    first = ["model", "replica", "data"]
    found = found[[*first, *(c for c in found.columns if c not in first)]]
    if options.json:
        print_json(found)
    else:
        print(census_table(found.drop(columns="data")).to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    return 0


COMMANDS = {
    "compare": Command(
        "attention of decoders: templates, split of scores, distances", _of_models(_add_compare), _compare
    ),
    "census": Command("label every head and say what it is used for", _of_models(_add_census), _census),
    "fit": Command("probes of position at every site of decoders, beside their controls", _of_models(_add_fit), _fit),
}
