"""The command that measures how often the toolkit is right."""

import argparse
from pathlib import Path

from probe.cli.command import Command, add_json, print_json, seed
from probe.cli.progress import progress
from probe.options import words

WHATS = ("intervals", "verdicts")


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=WHATS,
        help="intervals: how often each interval holds the truth, on simulated data; verdicts: how often each verdict "
        "is true, on models whose answer is known from how they were made",
    )
    parser.add_argument("--only", type=words, metavar="NAME,…", help="these simulations or verdicts (default: all)")
    parser.add_argument(
        "--simulations", type=int, default=2000, metavar="N", help="data sets of an interval (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=12, metavar="N", help="models of each kind (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes side by side (default: %(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="random seed of simulated data (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write all rows to this Parquet file")
    add_json(parser)


def _run(options: argparse.Namespace) -> int:
    from probe.benchmark import interval_coverage, verdict_rows, verdict_scores
    from probe.files import write_rows
    from probe.provenance import environment

    with progress(f"benchmark {options.what}") as shown:
        if options.what == "intervals":
            rows = table = interval_coverage(
                options.only,
                n_simulations=options.simulations,
                seed=options.seed,
                jobs=options.jobs,
                on_progress=shown.on_progress,
            )
        else:
            rows = verdict_rows(
                verdicts=options.only, n_seeds=options.seeds, jobs=options.jobs, on_progress=shown.on_progress
            )
            table = verdict_scores(rows)
    if options.out is not None:
        write_rows(options.out, rows, environment())
    if options.json:
        print_json(rows)
    else:
        print(table.to_string(index=False, na_rep="-", float_format=lambda x: f"{x:.3f}"))
    return 0


COMMANDS = {"benchmark": Command("measure how often intervals and verdicts are right", _add, _run)}
