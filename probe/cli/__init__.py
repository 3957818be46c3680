"""The command line: parses, calls, writes; nothing else. Options are made from the configs' dataclasses."""

import argparse
import contextlib
import difflib
import io
import os
import shlex
import shutil
import sys
import typing
from collections.abc import Collection, Sequence
from pathlib import Path

from probe.cli import benchmark, completion, constructions, decoders, doctor, examine, figures, study, sweeps, text
from probe.cli.command import Command
from probe.errors import ProbeError, one_line, printable, unknown_name
from probe.files import is_text
from probe.processes import deaf_to_interrupts
from probe.runs import COMMANDS as FOLDERS
from probe.runs import check_free

COMMANDS: dict[str, Command] = {
    **study.COMMANDS,
    **constructions.COMMANDS,
    **benchmark.COMMANDS,
    **decoders.COMMANDS,
    **text.COMMANDS,
    **examine.COMMANDS,
    **sweeps.COMMANDS,
    **figures.COMMANDS,
    **doctor.COMMANDS,
    **completion.COMMANDS,
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> typing.NoReturn:
        raise ProbeError(f"{message} ({self.prog} --help says what there is)")

    def unrecognized(self, arguments: Sequence[str]) -> ProbeError:
        """The error for what no option of this command takes, with the option that is nearest."""
        known = [flag.removeprefix("--") for flag in self._option_string_actions]  # they are alike in that anyway
        names = [argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")]
        near = [f"--{each}" for name in names for each in difflib.get_close_matches(name, known, n=1)]
        hint = f"did you mean {' '.join(near)}?" if near else f"{self.prog} --help says what there is"
        return ProbeError(f"unrecognized arguments: {' '.join(arguments)}; {hint}")


class _Printable:
    """A stream for what commands print: names come from files and folders, and must not steer the terminal."""

    def __init__(self, stream: typing.Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> typing.Any:
        return getattr(self._stream, name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0 when it went well, 1 when a claim does not hold or a run has failed, 2 for a wrong input (said in one line), 130
    where it was interrupted (said in one line, with the command that goes on), 141 where nobody reads what it writes.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # rather than to end on a name that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options = _parse(arguments)
        command, folder = _named(arguments), getattr(options, "folder", None)
        if command in FOLDERS and folder is not None:  # before minutes of loading; the command looks again
            check_free(Path(folder), command)
        with contextlib.redirect_stdout(_Printable(sys.stdout)):
            return options.run(options)
    except ProbeError as error:
        print(f"probe: {one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would say so once more
        return 141
    except OSError as error:
        said = f"{error.filename or 'file'}: {error.strerror or error}"
        print(f"probe: {one_line(said)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        with deaf_to_interrupts():
            print(f"probe: {_interrupted(arguments)}", file=sys.stderr)
        return 130


def build_parser(with_options: Collection[str]) -> argparse.ArgumentParser:
    """The parser of all commands; those named have their options, which take seconds to import."""
    parser = _Parser(prog="probe", description="How do transformers without position encoding know where they are?")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        subparser.set_defaults(run=command.run, parser=subparser)
        if name in with_options:
            command.add(subparser)
    return parser


def _named(arguments: Sequence[str]) -> str | None:
    """The command among the arguments, or what stands in its place."""
    return next((argument for argument in arguments if not argument.startswith("-")), None)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    for argument in arguments:
        if not is_text(argument):  # a report tells what was typed
            raise ProbeError(f"arguments in Unicode were wanted, got {argument!r}")
    name = _named(arguments)
    if name is not None and name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise (
            ProbeError(f"unknown command {name!r}; did you mean {near[0]!r}?")
            if near
            else unknown_name("command", name, COMMANDS)
        )
    options, left = build_parser([] if name is None else [name]).parse_known_args(arguments)
    if left:
        raise options.parser.unrecognized(left)
    options.typed = shlex.join(["probe", *arguments])  # for pages that say how they were made
    return options


def _interrupted(arguments: Sequence[str]) -> str:
    command = COMMANDS.get(_named(arguments) or "")
    if command is None or not command.resumes:
        return "interrupted"
    return f"interrupted; what was finished is kept, and this goes on from there: {_as_typed(arguments)}"


def _as_typed(arguments: Sequence[str]) -> str:
    """The command that this process runs, for a shell."""
    start = [sys.argv[0]]
    if Path(sys.argv[0]).name == "__main__.py":
        start = [sys.executable, "-m", "probe"]
    name = Path(start[0]).name
    if shutil.which(name) == start[0]:
        start[0] = name
    if "LOCAL_RANK" in os.environ:
        start = ["accelerate", "launch", "-m", "probe"]
    return shlex.join([*start, *arguments])
