"""The commands for decoders that there are: their attention, their heads, the position in their hidden states."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from probe.cli.command import Command, add_device, add_json, print_json, tell_folder
from probe.cli.progress import progress
from probe.cli.settings import add_task_options, add_text_options, study_config
from probe.options import integers, words

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from probe.measure import Case
    from probe.study import StudyConfig, TracedSequences
    from probe.study.places import Place


Add = Callable[[argparse.ArgumentParser], None]


def _of_models(own: Add, how_many: str = "+") -> Add:
    """A command's own options, and those that all of these have."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "models",
            nargs=how_many,
            metavar="MODEL",
            help="a study's folder (all of its models), a checkpoint's folder, or NAME=FOLDER,… (seeds of one model)",
        )
        own(parser)
        parser.add_argument(
            "--text",
            metavar="FOLDER",
            help="measure on texts: a folder of them, or python, the sources of its standard library (default for "
            "models with a tokenizer: python)",
        )
        parser.add_argument(
            "--tokens", metavar="FILE", help="measure on token ids, integers (sequence, position) in a .npy file"
        )
        add_json(parser)
        add_device(parser)
        add_task_options(parser)

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


def _add_measure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        type=words,
        metavar="NAME,…",
        help="measure these (default: all but what is measured only on request)",
    )
    parser.add_argument("--list", action="store_true", help="list the measurements, and what each needs and costs")
    parser.add_argument("--folder", default="runs/measure", help="where rows and report go (default: %(default)s)")
    parser.add_argument(
        "--contexts",
        type=integers,
        metavar="N,N,…",
        help="of models of text: tokens given at once (default: 1, 2, 4 and 8 times the trained length)",
    )
    add_text_options(parser)


def _measure(options: argparse.Namespace) -> int:
    from probe.errors import ProbeError, unknown_name
    from probe.measure import MEASUREMENTS, measure_models, measurements

    if options.list:
        return _list(options, measurements())
    for name in options.only or ():
        if name not in MEASUREMENTS:
            raise unknown_name("measurement", name, MEASUREMENTS)
    if not options.models:
        raise ProbeError("probe measure needs at least one model (probe measure --list lists the measurements)")
    with progress("measure") as shown:
        cases = _cases(options)
        rows = measure_models(
            cases,
            options.folder,
            options.only,
            options=_of_contexts(options, cases),
            typed=options.typed,
            train_length=next((case.texts.train_length for case in cases if case.texts is not None), None),
            say=shown.say,
            on_progress=shown.on_progress,
        )
    return tell_folder(options, rows)


def _of_contexts(options: argparse.Namespace, cases: "Sequence[Case]") -> dict[str, dict[str, list[int]]]:
    """The contexts, as options of the measurements that have them."""
    from probe.errors import ProbeError

    if options.contexts is None:
        return {}
    if all(case.texts is None for case in cases):
        raise ProbeError("--contexts needs models of text, got models with no texts in their tokens")
    names = {"perplexity": "contexts", "loss_by_position": "contexts", "passkey": "lengths"}
    return {measurement: {name: list(options.contexts)} for measurement, name in names.items()}


def _cases(options: argparse.Namespace) -> "list[Case]":
    """The models that were named, with the sequences, examples and texts that they can be measured on."""
    from probe.device import find_device
    from probe.study.cases import measured_cases
    from probe.study.places import load_all

    checkpoints, config = _find(options)
    models = load_all(checkpoints, str(find_device(options.device)))
    return measured_cases(
        models, checkpoints, config, tokens=options.tokens, text=options.text, train_length=options.train_length,
        n_texts=options.n_texts, n_prompts=options.n_prompts,
    )  # fmt: skip


def _list(options: argparse.Namespace, rows: "pd.DataFrame") -> int:
    if options.json:
        print_json(rows)
        return 0
    for row in rows.to_dict("records"):
        asked = " Measured only on request." if row["asked"] else ""
        print(f"{row['name']}: {row['what']}.{asked}\n    Needs: {row['needs']}.\n    Costs: {row['cost']}.")
    return 0


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", default="runs/compare", help="where rows and report go (default: %(default)s)")


def _compare(options: argparse.Namespace) -> int:
    from probe.study.checkpoints import compare_checkpoints

    folder, found = Path(options.folder), _find(options)
    with progress("compare") as shown:
        models, traced, seed = _load(options, *found)
        told = {"command": options.typed, "say": shown.say, "on_progress": shown.on_progress}
        rows = compare_checkpoints(models, traced, folder, seed=seed, **told)
    return tell_folder(options, rows)


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
    fit = rows[rows["measurement"] == "fit"]
    if options.json or "control" not in fit:
        return tell_folder(options, rows)
    found = fit[(fit["control"] == "none") & (fit["metric"] == "r2")].assign(what="r2")
    beside = fit[fit["metric"] == "selectivity"].assign(what=lambda each: "less " + each["control"])
    table = pd.concat([found, beside]).pivot_table(
        index=["model", "site", "target"], columns="what", values="value", sort=False
    )
    print(table.rename_axis(columns=None).to_string(float_format=lambda x: f"{x:.3f}"))
    return tell_folder(options, rows)


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
    "measure": Command(
        "measure models: any measurements, any models (--list lists the measurements)",
        _of_models(_add_measure, "*"),
        _measure,
        resumes=True,
    ),
    "compare": Command(
        "attention of decoders: templates, split of scores, distances", _of_models(_add_compare), _compare, resumes=True
    ),
    "census": Command("label every head and say what it is used for", _of_models(_add_census), _census),
    "fit": Command(
        "probes of position at every site of decoders, beside their controls", _of_models(_add_fit), _fit, resumes=True
    ),
}
