"""The commands for many trainings: a sweep, and the league of its encodings."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from probe.cli.command import Command, add_device, add_json, print_json, seed
from probe.cli.progress import progress
from probe.cli.settings import groups, sweep_config
from probe.errors import ProbeError
from probe.options import add_options


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    from probe.sweep import SweepConfig

    parser.add_argument("--folder", default="runs/sweep", help="where everything goes (default: %(default)s)")
    parser.add_argument("--preset", default="default", help="default (a laptop's corner) or paper (the paper's grid)")
    parser.add_argument("--config", metavar="FILE", help="a JSON file with settings; flags go before it")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one a core)")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster; auto: the one of this machine")
    parser.add_argument("--gpus-per-run", type=float, metavar="X", help="share of a GPU that a run asks Ray for")
    parser.add_argument("--cpus-per-run", type=float, default=1, metavar="X", help="cores that it asks Ray for")
    parser.add_argument("--retries", type=int, default=2, metavar="N", help="tries again of a run whose process died")
    parser.add_argument("--retry-failed", action="store_true", help="run those again that failed")
    add_json(parser)
    add_device(parser)
    add_options(parser, groups(SweepConfig))


def _sweep(options: argparse.Namespace) -> int:
    from probe.sweep import run_sweep

    folder = Path(options.folder)
    with progress("sweep") as shown:
        rows = run_sweep(
            sweep_config(options),
            folder,
            device=options.device,
            jobs=options.jobs,
            ray=options.ray,
            gpus_per_run=options.gpus_per_run,
            cpus_per_run=options.cpus_per_run,
            retries=options.retries,
            retry_failed=options.retry_failed,
            say=shown.say,
            on_progress=shown.on_progress,
        )
    if options.json:
        print_json(rows)
    else:
        print(folder / "results")
    return 1 if (rows["status"] == "failed").any() else 0


def _add_league(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", nargs="?", metavar="FOLDER", help="a sweep's folder")
    parser.add_argument("--published", metavar="FILE", help="a table of published accuracies, ranked by the same code")
    parser.add_argument("--by", default="lengths", choices=("lengths", "overall"), help="what a run's score is of")
    parser.add_argument("--metric", default="exact_match", help="exact_match, steps_exact, …")
    parser.add_argument("--out", metavar="FILE", help="the page (default: league.html in the sweep's folder)")
    parser.add_argument("--seed", type=seed, default=0, help="of bootstrap and sign flips (default: %(default)s)")
    add_json(parser)


def _league(options: argparse.Namespace) -> int:
    import pandas as pd

    from probe.files import write_text
    from probe.league import accuracy_by_length, league, paired_differences, read_published
    from probe.progress import Steps
    from probe.provenance import environment
    from probe.report.league import league_page
    from probe.report.page import Made
    from probe.runs import check_output
    from probe.sweep.results import failures, read_results, results_of

    if options.sweep is None and options.published is None:
        raise ProbeError("a sweep's folder or --published FILE is wanted, got neither")
    out = Path(options.out) if options.out else Path(options.sweep or ".") / "league.html"
    check_output(out)
    sources: dict[str, pd.DataFrame] = {}
    said: Sequence[str] = ()
    if options.sweep is not None:
        rows = read_results(options.sweep)
        sources["ours"] = results_of(rows, options.metric)
        said = failures(rows)
    if options.published is not None:
        sources["published"] = read_published(options.published)
    leagues, differences, by_length = {}, {}, {}
    with progress("league") as shown:
        steps = Steps(2 * len(sources), shown.on_progress)
        for source, results in sources.items():
            leagues[source] = league(results, by=options.by)
            steps.step()
            differences[source] = paired_differences(results, by=options.by, seed=options.seed)
            by_length[source] = accuracy_by_length(results)
            steps.step()
    tables = {"league": leagues, "difference": differences, "accuracy": by_length}
    parts = [found.assign(table=table, source=source) for table, of in tables.items() for source, found in of.items()]
    rows = pd.concat(parts, ignore_index=True)
    made = Made(options.typed, environment=environment())
    write_text(out, league_page(leagues, differences, by_length, said, rows=rows, made=made))
    if options.json:
        print_json(rows)
        return 0
    for source, found in leagues.items():
        print(f"{source}:")
        print(found.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    print(out)
    return 0


COMMANDS = {
    "sweep": Command("train and evaluate encodings × tasks × scratchpads × seeds", _add_sweep, _sweep, resumes=True),
    "league": Command("which encoding generalises best: ranks, differences, by length", _add_league, _league),
}
