"""What is made from the code while the documentation is built: words, commands, limits. Nothing of it is kept."""

import os
import re

import pandas as pd
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

MARKUP = re.compile(r"([\\`*_<>\[\]|$~#])")


def definitions() -> str:
    """The glossary of the reports as a definition list."""
    from probe.report.glossary import DEFINITIONS

    words = sorted(DEFINITIONS.items(), key=lambda item: item[0].lower())
    return "\n\n".join(f"{_plain(word)}\n: {_plain(meaning)}" for word, meaning in words)


def columns() -> str:
    """The schema of rows, a row a column."""
    from probe.rows import COLUMNS

    lines = [f"| `{name}` | {column.kind} | {_plain(column.meaning)} |" for name, column in COLUMNS.items()]
    return "\n".join(["| column | kind | meaning |", "|---|---|---|", *lines])


def _plain(text: str) -> str:
    """Text in which nothing is markup."""
    return MARKUP.sub(r"\\\1", text)


def commands() -> str:
    """A section a command: what ``--help`` says."""
    from probe.cli import COMMANDS, build_parser

    os.environ["COLUMNS"] = "96"  # argparse asks for the width of a terminal
    parsers = build_parser(COMMANDS)._subparsers._group_actions[0].choices
    return "\n\n".join(f"## probe {name}\n\n```text\n{each.format_help()}```" for name, each in parsers.items())


def limits() -> str:
    """``constructions/limits.csv``, a row a construction and dtype."""
    from constructions.limits import TABLE

    lines = ["| construction | layers | dtype | right to | wrong from |", "|---|---|---|---|---|"]
    for (name, dtype), rows in pd.read_csv(TABLE).groupby(["construction", "dtype"], sort=False):
        layers = f"{rows['attention_layers'].iloc[0]} + {rows['mlp_layers'].iloc[0]}"
        runs = [(length, of) for length, of in rows.groupby("length")]
        right = [_length(length, of) for length, of in runs if of["holds"].all()]
        wrong = [f"{of['first_failure'].min():,.0f} of {_length(n, of)}" for n, of in runs if not of["holds"].all()]
        lines.append(f"| `{name}` | {layers} | {dtype} | {(right or ['—'])[-1]} | {(wrong or ['—'])[0]} |")
    return "\n".join(lines)


def _length(length: int, rows: pd.DataFrame) -> str:
    return f"{length:,}*" if (rows["positions_checked"] < rows["length"]).any() else f"{length:,}"


GENERATED = {"columns": columns, "definitions": definitions, "commands": commands, "limits": limits}


class Generated(SphinxDirective):
    """Puts Markdown that a function makes in its place."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(GENERATED[self.name](), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    for name in GENERATED:
        app.add_directive(name, Generated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
