"""The command that runs what the theory claims."""

import argparse

from probe.cli.command import Command, add_json, print_json, seed
from probe.cli.progress import progress
from probe.errors import unknown_name
from probe.options import integers, words

_COLUMNS = [
    *("construction", "quantity", "source", "length", "dtype", "attention", "attention_layers", "mlp_layers", "width"),
    *("largest_error", "tolerance", "first_failure", "holds"),
]


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="constructions (default: all)")
    parser.add_argument("--lengths", type=integers, metavar="N,N,…", help="tokens in the sequence")
    parser.add_argument("--dtypes", type=words, metavar="DTYPE,…", help="float64, float32, bfloat16, float16")
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", dest="level", action="store_const", const="quick", help="short lengths, all dtypes")
    level.add_argument("--full", dest="level", action="store_const", const="full", help="to every claim's limit")
    parser.add_argument("--seed", type=seed, default=0, help="of the sequences (default: %(default)s)")
    add_json(parser)


def _verify(options: argparse.Namespace) -> int:
    import torch

    import constructions

    known = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
    for name in options.dtypes or ():
        if name not in known:
            raise unknown_name("dtype", name, known)
    dtypes = [known[name] for name in options.dtypes] if options.dtypes else None
    with progress("verify") as shown:
        rows = constructions.verify(
            options.names or None,
            lengths=options.lengths,
            dtypes=dtypes,
            level=options.level or "default",
            on_progress=shown.on_progress,
            seed=options.seed,
        )
    if options.json:
        print_json(rows)
    else:
        print(rows.to_string(index=False, columns=_COLUMNS, na_rep="-", float_format=lambda x: f"{x:.3g}"))
    return 0 if rows["holds"].all() else 1


COMMANDS = {"verify": Command("run every construction's claim through a real model", _add_verify, _verify)}
