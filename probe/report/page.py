"""Sections of figures, tables and words -> one HTML page that needs nothing from anywhere else.

plotly.js, the figures and what can be downloaded are in the page, compressed: the browser unpacks them
(``DecompressionStream``, in every browser since 2023). That takes 3 MB off every page, and half or more off its
figures. ``page_assets`` holds the page's skeleton, its style and its script.
"""

import base64
import functools
import gzip
import hashlib
import importlib.resources
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jinja2
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from probe.errors import ProbeError
from probe.limits import current
from probe.report.cells import harmless_csv, is_number, sort_keys, table_csv, text_of
from probe.report.glossary import DEFINITIONS, IN_WORDS, definition_of
from probe.report.style import least_width

FILTERED = 20  # rows from which on a table can be filtered
Piece = tuple[str, str | None]  # words, and the id of their definition


class Line(NamedTuple):
    """A line of a summary: a word or two that say what it is of, a sentence, and the same of each model."""

    lead: str
    text: str
    items: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A heading, what there is to say, and the figures and tables that show it. All text is escaped.

    Names of ``DEFINITIONS`` that head a column, or stand in the first column or one whose head is defined, can be asked
    for their definition; so can what ``IN_WORDS`` lists in texts and captions. Where the columns of a table are values
    of one key, its name is ``table.columns.name``.
    """

    title: str  #: the heading
    text: Sequence[str] = ()  #: paragraphs
    figures: Sequence[tuple[str, go.Figure]] = ()  #: caption, figure
    tables: Sequence[tuple[str, pd.DataFrame]] = field(default=())  #: caption, table


@dataclass(frozen=True)
class Made:
    """How to make a page again: the command, the files that it wants (name: text), and what was used."""

    command: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def render_page(
    title: str,
    summary: Sequence[str | Line],
    sections: Sequence[Section],
    *,
    rows: pd.DataFrame | None = None,
    rows_file: str = "rows.parquet",
    made: Made | None = None,
) -> str:
    """The page as HTML: summary, table of contents, sections, how it was made, definitions; plotly inlined once.

    Args:
        rows: all that was measured, to be downloaded from the page as CSV: ``rows.to_csv(index=False)``, with a ``'``
            in front of text that a spreadsheet would run as a formula. Where the page would be larger than 6 MB with
            them, it says that they are in ``rows_file`` beside it.

    Raises:
        ProbeError: without any section.
    """
    if not sections:
        raise ProbeError("a page wants at least one section, got none")
    terms = _Terms(_models_in(rows))
    shown = [_section(i, section, terms) for i, section in enumerate(sections, start=1)]
    lines = [line if isinstance(line, Line) else Line("", line) for line in summary]
    style, script = _asset("page.css"), _asset("page.js")
    page = functools.partial(
        _template().render,
        title=title,
        summary=[{"lead": line.lead, "text": terms.within(line.text), "said": line.items} for line in lines],
        sections=shown,
        n_rows=None if rows is None else len(rows),
        rows_file=rows_file,
        made=None if made is None else _made(made),
        definitions=terms.asked,
        filtered=FILTERED,
        plotly_js=_packed_plotly(),
        # These two come from files of this package, where nothing is to be escaped.
        style=Markup(style),
        script=Markup(script),
        policy=_policy(script),
    )
    without = page(rows_csv=None)
    if rows is None:
        return without
    table = harmless_csv(rows)
    packed = {"data": _packed(table), "size": _size(len(table.encode()))}
    fits = len(without.encode()) + len(packed["data"]) + 1000 <= current().page_bytes
    return page(rows_csv=packed) if fits else without


class _Terms:
    """The definitions that a page is asked for, each once."""

    def __init__(self, models: Collection[str] = ()) -> None:
        self.models = models  # the names of the models that the page shows
        self.asked: dict[str, tuple[str, str]] = {}  # name: id, definition

    def of(self, name: str, of: str | None = None) -> str | None:
        """The id of the definition of a name, or of a name as a value of what a column is called."""
        key = definition_of(name, of)
        if key is None:
            return None
        return self.asked.setdefault(key, (f"definition-{len(self.asked) + 1}", DEFINITIONS[key]))[0]

    def of_head(self, name: str, of: str | None) -> str | None:
        """The id of the definition of a column's head, where the columns are values of a key. Those of a table whose
        columns are models are the models, and besides them some that are not."""
        if of != "model":
            return self.of(name, of)
        return self.of(name, of) or (None if name in self.models else self.of(name))

    def within(self, text: str) -> list[Piece]:
        """A text in pieces, what it says of ``IN_WORDS`` for the first time with its definition."""
        pieces, seen = [], set()
        for i, piece in enumerate(_WORDS.split(text)):
            new = i % 2 == 1 and piece not in seen
            seen.add(piece)
            pieces.append((piece, self.of(IN_WORDS[piece]) if new else None))
        return pieces


def _models_in(rows: pd.DataFrame | None) -> set[str]:
    """The names of the models in rows."""
    named = ("model", "model_a", "model_b", "reference", "table")
    return set() if rows is None else {name for each in named if each in rows for name in rows[each].dropna()}


class _Silent(_Terms):
    """No definitions: names of settings and packages are no names in rows."""

    def of(self, name: str, of: str | None = None) -> None:
        return None


_WORDS = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, sorted(IN_WORDS, key=len, reverse=True)))})(?!\w)")


def _section(number: int, section: Section, terms: _Terms) -> dict[str, Any]:
    figures = [
        {
            "id": f"figure-{number}-{j}",
            "caption": terms.within(caption),
            "file": (figure.layout.meta or {}).get("name") or _slug(f"{section.title} {caption}"),
            "height": figure.layout.height or 450,
            "width": least_width(figure),
            "packed": _packed(figure.to_json()),
        }
        for j, (caption, figure) in enumerate(section.figures, start=1)
    ]
    tables = [
        _table(f"table-{number}-{j}", section.title, caption, table, terms)
        for j, (caption, table) in enumerate(section.tables, start=1)
    ]
    text = [terms.within(line) for line in section.text]
    return {"id": f"section-{number}", "title": section.title, "text": text, "figures": figures, "tables": tables}


def _table(identity: str, title: str, caption: str, table: pd.DataFrame, terms: _Terms) -> dict[str, Any]:
    heads = [str(name) for name in table.columns]
    head_terms = [terms.of_head(head, table.columns.name) for head in heads]
    cells = [table.iloc[:, i].tolist() for i in range(len(heads))]
    shown = []
    for i, (head, column) in enumerate(zip(heads, cells, strict=True)):
        defined = i == 0 or head_terms[i] is not None
        shown.append(
            [
                {
                    "text": text_of(value),
                    "key": _for_script(key),
                    "number": is_number(value),
                    "term": terms.of(value, head) if defined and isinstance(value, str) else None,
                }
                for value, key in zip(column, sort_keys(column), strict=True)
            ]
        )
    return {
        "id": identity,
        "name": caption or title,
        "caption": terms.within(caption),
        "heads": list(zip(heads, head_terms, strict=True)),
        "rows": list(zip(*shown, strict=True)),
        "file": _slug(f"{title} {caption}"),
        "packed": _packed(table_csv(table)),
    }


def _made(made: Made) -> dict[str, Any]:
    tables = [("Settings", _flat(made.settings)), ("Versions", dict(made.environment))]
    return {
        "command": made.command,
        "files": [(name, text, _packed(text)) for name, text in made.files.items()],
        "tables": [
            _table(
                f"table-made-{i}", name, f"{name}.", pd.DataFrame({"name": of.keys(), "value": of.values()}), _Silent()
            )
            for i, (name, of) in enumerate(tables, start=1)
            if of
        ],
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by their whole names, "training.steps"."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            listed = isinstance(value, Sequence) and not isinstance(value, str)
            flat[prefix + name] = ", ".join(map(str, value)) if listed else str(value)
    return flat


def _slug(text: str) -> str:
    """A name for a file, out of a caption."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].rstrip("-") or "figure"


def _for_script(key: float | None) -> str | None:
    """A number as JavaScript reads it."""
    return None if key is None else repr(key).replace("inf", "Infinity")


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:.0f} kB"


def _packed(text: str) -> str:
    """gzip in base64; without a time stamp, so that equal pages are equal."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


@functools.cache
def _packed_plotly() -> str:
    return _packed(get_plotlyjs())


@functools.cache
def _policy(script: str) -> str:
    """What the page may do: run its own two scripts, draw, and nothing that reaches anywhere.

    A script that got into the page in spite of all escaping has another hash, and does not run.
    """
    return content_policy((script, get_plotlyjs()))


def content_policy(scripts: Sequence[str], *, beside: bool = False) -> str:
    """The content-security policy of a page that runs these scripts, draws, and requests nothing.

    Args:
        scripts: the texts of the scripts in the page.
        beside: whether the page runs scripts of files beside it, too.
    """
    own = [f"'sha256-{_sha256(text)}'" for text in scripts]
    if beside:
        own += ["'self'", "file:"]  # a page that is opened from a disk has no origin to be "self"
    return (
        f"default-src 'none'; script-src {' '.join(own)}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@functools.cache
def _asset(name: str) -> str:
    return (importlib.resources.files("probe.report") / "page_assets" / name).read_text(encoding="utf-8")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_asset("page.html"))
