"""The command line: parses, calls, writes; nothing else. Options are made from the configs' dataclasses."""

import argparse
import contextlib
import dataclasses
import functools
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from probe.cli.examine import add_examine_command
from probe.cli.text import add_text_commands
from probe.errors import ProbeError, unknown_name
from probe.files import read_json_object
from probe.options import add_options, flags, integers, words


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> typing.NoReturn:
        raise ProbeError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it went well, 1 when a claim does not hold, 2 for a wrong input (said in one line)."""
    try:
        options = _parser().parse_args(arguments)
        return options.run(options)
    except ProbeError as error:
        print(f"probe: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"probe: {error.filename or 'file'}: {error.strerror}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="probe", description="How do transformers without position encoding know where they are?")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

    study = commands.add_parser("study", help="train, evaluate, probe, compare, verify: one report")
    study.set_defaults(run=_study)
    study.add_argument("--folder", default="runs/study", help="where everything goes (default: %(default)s)")
    study.add_argument("--preset", default="default", help="default (minutes on a laptop) or paper (the paper's size)")
    study.add_argument("--config", metavar="FILE", help="a JSON file with settings; flags go before it")
    study.add_argument("--jobs", type=int, help="models worked on at once (default: one a core)")
    _add_device(study)
    _add_study_options(study)

    verify = commands.add_parser("verify", help="run every construction's claim through a real model")
    verify.set_defaults(run=_verify)
    verify.add_argument("names", nargs="*", metavar="NAME", help="constructions (default: all)")
    verify.add_argument("--lengths", type=integers, metavar="N,N,…", help="tokens in the sequence")
    verify.add_argument("--dtypes", type=words, metavar="DTYPE,…", help="float64, float32, bfloat16, float16")
    level = verify.add_mutually_exclusive_group()
    level.add_argument("--quick", dest="level", action="store_const", const="quick", help="short lengths, all dtypes")
    level.add_argument("--full", dest="level", action="store_const", const="full", help="to every claim's limit")
    verify.add_argument("--json", action="store_true", help="rows as JSON lines")

    compare = commands.add_parser("compare", help="attention of decoders: templates, split of scores, distances")
    compare.set_defaults(run=_compare)
    compare.add_argument("--folder", default="runs/compare", help="where rows and report go (default: %(default)s)")
    census = commands.add_parser("census", help="label every head and say what it is used for")
    census.set_defaults(run=_census)
    census.add_argument("--head-detector", action="store_true", help="TransformerLens's scores beside them")
    census.add_argument("--json", action="store_true", help="rows as JSON lines")
    fit = commands.add_parser("fit", help="probes of position at every site of decoders, beside their controls")
    fit.set_defaults(run=_fit)
    fit.add_argument("--folder", default="runs/fit", help="where rows and report go (default: %(default)s)")
    fit.add_argument("--sites", type=words, metavar="SITE,…", help="TransformerLens names (default: all)")
    fit.add_argument("--targets", type=words, metavar="NAME,…", help="what is read (default: position, log, inverse)")
    fit.add_argument("--fitted-length", type=int, metavar="N", help="fit to N tokens and score on up to 4 N as well")
    fit.add_argument("--over-training", action="store_true", help="probes at every checkpoint that the runs have kept")
    for command in (compare, census, fit):
        command.add_argument(
            "models",
            nargs="+",
            metavar="MODEL",
            help="a study's folder (all of its models), a checkpoint's folder, or NAME=FOLDER,… (seeds of one model)",
        )
        command.add_argument("--tokens", metavar="FILE", help="token ids, .npy (default: a task's held-out sequences)")
        command.add_argument("--preset", default="default")
        command.add_argument("--config", metavar="FILE", help="a study's JSON file")
        _add_device(command)
        _add_study_options(command, only=("task", "task_options", "trace_sequences", "trace_length", "seed"))

    training = commands.add_parser("train", help="train one decoder (also under `accelerate launch -m probe`)")
    training.set_defaults(run=_train)
    training.add_argument("--folder", required=True, help="where the run goes")
    training.add_argument("--encoding", default="none")
    training.add_argument("--keep-checkpoints", action="store_true", help="for `probe fit --over-training`")
    training.add_argument("--preset", default="default")
    training.add_argument("--config", metavar="FILE", help="a study's JSON file")
    _add_device(training)
    _add_study_options(
        training, without=("encodings", "load", "seeds", "trace_sequences", "trace_length", "verify_lengths")
    )

    add_text_commands(commands, _add_device)
    add_examine_command(commands, _add_device)

    from probe.sweep import SweepConfig

    models = commands.add_parser("models", help="which released models can be loaded, and how")
    models.set_defaults(run=_models)
    models.add_argument("--json", action="store_true", help="rows as JSON lines")

    sweep = commands.add_parser("sweep", help="train and evaluate encodings × tasks × scratchpads × seeds")
    sweep.set_defaults(run=_sweep)
    sweep.add_argument("--folder", default="runs/sweep", help="where everything goes (default: %(default)s)")
    sweep.add_argument("--preset", default="default", help="default (a laptop's corner) or paper (the paper's grid)")
    sweep.add_argument("--config", metavar="FILE", help="a JSON file with settings; flags go before it")
    sweep.add_argument("--jobs", type=int, help="runs at a time (default: one a core)")
    sweep.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster; auto: the one of this machine")
    sweep.add_argument("--gpus-per-run", type=float, metavar="X", help="share of a GPU that a run asks Ray for")
    sweep.add_argument("--cpus-per-run", type=float, default=1, metavar="X", help="cores that it asks Ray for")
    sweep.add_argument("--retries", type=int, default=2, metavar="N", help="tries again of a run whose process died")
    sweep.add_argument("--retry-failed", action="store_true", help="run those again that failed")
    _add_device(sweep)
    add_options(sweep, _groups(SweepConfig))

    league = commands.add_parser("league", help="which encoding generalises best: ranks, differences, by length")
    league.set_defaults(run=_league)
    league.add_argument("sweep", nargs="?", metavar="FOLDER", help="a sweep's folder")
    league.add_argument("--published", metavar="FILE", help="a table of published accuracies, ranked by the same code")
    league.add_argument("--by", default="lengths", choices=("lengths", "overall"), help="what a run's score is of")
    league.add_argument("--metric", default="exact_match", help="exact_match, steps_exact, …")
    league.add_argument("--out", metavar="FILE", help="the page (default: league.html in the sweep's folder)")
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")


def _groups(settings: type) -> dict[str, type]:
    """The dataclasses whose fields are options, by the key under which a study's or a sweep's settings hold them."""
    from probe.models.decoder import DecoderConfig
    from probe.training import TrainingConfig

    return {"": settings, "model": DecoderConfig, "training": TrainingConfig}


def _add_study_options(
    parser: argparse.ArgumentParser, without: Sequence[str] = (), only: Sequence[str] | None = None
) -> None:
    from probe.study import StudyConfig

    add_options(parser, _groups(StudyConfig), without, only)


def _study_config(options: argparse.Namespace, study=None):
    """Preset (or a study that there is), then file, then flags; each overrides what came before it, key by key."""
    from probe.study import PRESETS, StudyConfig

    if options.preset not in PRESETS:
        raise unknown_name("preset", options.preset, PRESETS)
    preset = study or PRESETS[options.preset]
    values = dataclasses.asdict(preset)
    file = {} if options.config is None else read_json_object(Path(options.config))
    for name, value in file.items():
        if name == "training" and isinstance(value, dict):
            value = {**values["training"], **value}
        values[name] = value
    said = flags(options)
    given = {"model": said.pop("model", {}), "training": said.pop("training", {}), "": said}
    if {**values, **said}["task"] != preset.task and "task_options" not in {**file, **said}:
        values["task_options"] = {}  # another task's options do not carry over
    for key, of in given.items():
        values = {**values, **of} if not key else {**values, key: {**values[key], **of}}
    return StudyConfig.from_dict(values)


def _sweep_config(options: argparse.Namespace):
    """Preset, then file, then flags."""
    from probe.sweep import PRESETS, SweepConfig

    if options.preset not in PRESETS:
        raise unknown_name("preset", options.preset, PRESETS)
    values = dataclasses.asdict(SweepConfig())
    file = {} if options.config is None else read_json_object(Path(options.config))
    for source in (PRESETS[options.preset], file, flags(options)):
        for name, value in source.items():
            inner = name in ("model", "training") and isinstance(value, dict)
            values[name] = {**values.get(name, {}), **value} if inner else value
    return SweepConfig.from_dict(values)


def _sweep(options: argparse.Namespace) -> int:
    from probe.sweep import run_sweep

    rows = run_sweep(
        _sweep_config(options),
        Path(options.folder),
        device=options.device,
        jobs=options.jobs,
        ray=options.ray,
        gpus_per_run=options.gpus_per_run,
        cpus_per_run=options.cpus_per_run,
        retries=options.retries,
        retry_failed=options.retry_failed,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(Path(options.folder) / "results")
    return 1 if (rows["status"] == "failed").any() else 0


def _league(options: argparse.Namespace) -> int:
    from probe.files import write_text
    from probe.report.league import league_page
    from probe.sweep.results import failures, read_results, results_of
    from probe.training.league import accuracy_by_length, league, paired_differences, read_published

    if options.sweep is None and options.published is None:
        raise ProbeError("a sweep's folder or --published FILE is wanted, got neither")
    sources, said = {}, []
    if options.sweep is not None:
        rows = read_results(options.sweep)
        sources["ours"] = results_of(rows, options.metric)
        said = failures(rows)
    if options.published is not None:
        sources["published"] = read_published(options.published)
    leagues = {source: league(results, by=options.by) for source, results in sources.items()}
    differences = {source: paired_differences(results, by=options.by) for source, results in sources.items()}
    by_length = {source: accuracy_by_length(results) for source, results in sources.items()}
    out = Path(options.out) if options.out else Path(options.sweep or ".") / "league.html"
    write_text(out, league_page(leagues, differences, by_length, said))
    for source, rows in leagues.items():
        print(f"{source}:")
        print(rows.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    print(out)
    return 0


def _study(options: argparse.Namespace) -> int:
    from probe.study import run_study

    config, folder = _study_config(options), Path(options.folder)
    with _bars(config.training.steps) as (say, on_log):
        run_study(config, folder, device=options.device, jobs=options.jobs, say=say, on_log=on_log)
    print(folder / "report.html")
    return 0


def _models_and_tokens(options: argparse.Namespace):
    """The models by name, the folders of their checkpoints, the sequences on which they are looked at, and a seed."""
    from probe.device import find_device
    from probe.study import StudyData, TracedSequences
    from probe.study.places import find_checkpoints, load_all, read_tokens

    checkpoints, study = find_checkpoints(options.models)
    config = _study_config(options, study)
    if options.tokens is None:
        traced = StudyData.of(config).traced(config)
    else:
        traced = TracedSequences(read_tokens(options.tokens))
    return load_all(checkpoints, str(find_device(options.device))), checkpoints, traced, config.seed


def _compare(options: argparse.Namespace) -> int:
    from probe.study.checkpoints import compare_checkpoints

    models, _, traced, seed = _models_and_tokens(options)
    folder = Path(options.folder)
    compare_checkpoints(models, traced, folder, seed=seed, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(folder / "report.html")
    return 0


def _fit(options: argparse.Namespace) -> int:
    import pandas as pd

    from probe.study.checkpoints import fit_checkpoints

    models, checkpoints, traced, seed = _models_and_tokens(options)
    runs = {name: places[0].folder.parent for name, places in checkpoints.items()} if options.over_training else {}
    given = {name: getattr(options, name) for name in ("sites", "targets") if getattr(options, name)}
    folder = Path(options.folder)
    rows = fit_checkpoints(
        models, traced, folder, fitted_length=options.fitted_length, over_training=runs, seed=seed, **given
    )
    fit = rows[rows["measurement"] == "fit"]
    found = fit[(fit["control"] == "none") & (fit["metric"] == "r2")].assign(what="r2")
    beside = fit[fit["metric"] == "selectivity"].assign(what=lambda each: "less " + each["control"])
    table = pd.concat([found, beside]).pivot_table(
        index=["encoding", "site", "target"], columns="what", values="value", sort=False
    )
    print(table.rename_axis(columns=None).to_string(float_format=lambda x: f"{x:.3f}"))
    print(folder / "report.html")
    return 0


def _models(options: argparse.Namespace) -> int:
    from probe.models.pretrained import released_models

    rows = released_models()
    if options.json:
        print(rows.to_json(orient="records", lines=True), end="")
    else:
        widths = [max(map(len, [name, *rows[name]])) for name in rows]
        for row in [tuple(rows), *rows.itertuples(index=False)]:
            print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _census(options: argparse.Namespace) -> int:
    import pandas as pd

    from probe.attention import census, census_table

    models, _, (tokens, scored), seed = _models_and_tokens(options)
    rows = []
    for name, decoders in models.items():
        for replica, decoder in enumerate(decoders):
            counted = census(decoder, tokens, scored=scored, head_detector=options.head_detector, seed=seed)
            rows.append(counted.assign(model=name, replica=replica))
    found = pd.concat(rows, ignore_index=True)
    found = found[["model", "replica", *(c for c in found.columns if c not in ("model", "replica"))]]
    if options.json:
        print(found.to_json(orient="records", lines=True, double_precision=15), end="")
    else:
        print(census_table(found).to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    return 0


def _train(options: argparse.Namespace) -> int:
    from probe.study import train_one

    config, folder = _study_config(options), Path(options.folder)
    with _bars(config.training.steps) as (_, on_log):
        watch = functools.partial(on_log, options.encoding)
        keep = options.keep_checkpoints
        train_one(config, options.encoding, folder, device=options.device, keep_checkpoints=keep, on_log=watch)
    print(folder / "final")
    return 0


@contextlib.contextmanager
def _bars(steps: int) -> Iterator[tuple[Callable[[str], None], Callable[[str, dict], None]]]:
    """A way to say a line, and one to show a training's progress: bars in a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda line: print(line, file=sys.stderr, flush=True), lambda name, entry: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("loss {task.fields[loss]:.4f}"))  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bars: dict[str, Any] = {}

        def show(name: str, entry: dict) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=steps, loss=entry["loss"])
            progress.update(bars[name], completed=entry["step"], loss=entry["loss"])

        yield lambda line: progress.console.print(line, markup=False), show


_VERIFY_COLUMNS = [
    *("construction", "quantity", "source", "length", "dtype", "attention", "attention_layers", "mlp_layers", "width"),
    *("largest_error", "tolerance", "first_failure", "holds"),
]


def _verify(options: argparse.Namespace) -> int:
    import torch

    import constructions

    known = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
    for name in options.dtypes or ():
        if name not in known:
            raise unknown_name("dtype", name, known)
    dtypes = [known[name] for name in options.dtypes] if options.dtypes else None
    rows = constructions.verify(
        options.names or None, lengths=options.lengths, dtypes=dtypes, level=options.level or "default"
    )
    if options.json:
        print(rows.to_json(orient="records", lines=True, double_precision=15), end="")
    else:
        print(rows.to_string(index=False, columns=_VERIFY_COLUMNS, na_rep="-", float_format=lambda x: f"{x:.3g}"))
    return 0 if rows["holds"].all() else 1
