"""The command that makes a shell know the others: their names, options, and what an option may be told."""

import argparse
from collections.abc import Iterable

from probe.cli.command import Command

SHELLS = ("bash", "zsh", "fish")


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "For good: probe completion bash > ~/.local/share/bash-completion/completions/probe; "
        "probe completion zsh > DIRECTORY/_probe, of a directory in fpath; "
        "probe completion fish > ~/.config/fish/completions/probe.fish"
    )
    parser.add_argument("shell", choices=SHELLS, help="whose completion is written")


def _completion(options: argparse.Namespace) -> int:
    print(completion_script(options.shell))
    return 0


def completion_script(shell: str) -> str:
    """What a shell reads to complete every command: made once from the parser, so that a TAB starts no Python."""
    import shtab

    from probe.cli import COMMANDS, build_parser

    parser = build_parser(COMMANDS)
    of_files = {"FILE": shtab.FILE, "FOLDER": shtab.DIRECTORY, "MODEL": shtab.DIRECTORY}
    values = _values()
    for name, command in _subparsers(parser).items():
        for action in command._actions:
            key = action.dest.removeprefix(".")
            chosen = values.get(f"{name} {key}", values.get(key))
            if action.choices is None and chosen is not None:
                action.choices = list(chosen)
            elif action.metavar in of_files or key == "folder":
                kind = of_files.get(str(action.metavar), shtab.DIRECTORY)
                action.complete = kind  # type: ignore[attr-defined]  # which is how shtab is told
    return shtab.complete(parser, shell)


def _values() -> dict[str, Iterable[str]]:
    """What there is to choose from, by the name of an option, or that of a command and its option. Of several values
    with commas between the first can be chosen so."""
    from constructions import CONSTRUCTIONS, PROPOSITIONS
    from probe.device import DEVICES
    from probe.models.encodings import ENCODINGS
    from probe.position.probes.targets import TARGETS
    from probe.study import PRESETS
    from probe.study.beyond import FITS
    from probe.sweep import PRESETS as SWEEPS
    from probe.sweep.config import SCRATCHPADS
    from probe.tasks import TASKS

    return {
        "device": DEVICES,
        "preset": PRESETS,
        "sweep preset": SWEEPS,
        "encoding": ENCODINGS,
        "encodings": ENCODINGS,
        "task": TASKS,
        "tasks": TASKS,
        "scratchpads": SCRATCHPADS,
        "targets": TARGETS,
        "fits": FITS,
        "verify names": [*CONSTRUCTIONS, *PROPOSITIONS],
    }


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices


COMMANDS = {"completion": Command("a script that completes these commands in a shell", _add_completion, _completion)}
