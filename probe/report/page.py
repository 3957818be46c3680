"""Sections of figures, tables and words -> one HTML page that needs nothing from anywhere else.

plotly.js and the figures are in the page, compressed: the browser unpacks them (``DecompressionStream``, in every
browser since 2023) and draws. That takes 3 MB off every page, and half or more off its figures.
"""

import base64
import functools
import gzip
import html
from collections.abc import Sequence
from dataclasses import dataclass, field

import jinja2
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from probe.errors import ProbeError


@dataclass(frozen=True)
class Section:
    """A heading, what there is to say, and the figures and tables that show it. All text is escaped."""

    title: str
    text: Sequence[str] = ()
    figures: Sequence[tuple[str, go.Figure]] = ()  # caption, figure
    tables: Sequence[tuple[str, pd.DataFrame]] = field(default=())  # caption, table


def render_page(title: str, summary: Sequence[str], sections: Sequence[Section]) -> str:
    """The page as HTML: summary, table of contents, sections; plotly inlined once.

    Raises:
        ProbeError: without any section.
    """
    if not sections:
        raise ProbeError("a page wants at least one section, got none")
    numbered = []
    for i, section in enumerate(sections, start=1):
        figures = [
            (caption, f"figure-{i}-{j}", _packed(figure.to_json()))
            for j, (caption, figure) in enumerate(section.figures, start=1)
        ]
        tables = [(caption, _table(table)) for caption, table in section.tables]
        numbered.append(
            {"id": f"section-{i}", "title": section.title, "text": section.text, "figures": figures, "tables": tables}
        )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # Only what _packed, _table and this file made, which escape what they are given, is passed on as markup.
    environment.filters["markup"] = _markup
    return environment.from_string(_PAGE).render(
        title=title, summary=summary, sections=numbered, plotly_js=_packed_plotly(), style=_STYLE, draw=_DRAW
    )


@functools.cache
def _packed_plotly() -> str:
    return _packed(get_plotlyjs())


def _packed(text: str) -> str:
    """gzip in base64; without a time stamp, so that equal pages are equal."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _markup(text: str):
    from markupsafe import Markup

    return Markup(text)


def _table(table: pd.DataFrame) -> str:
    head = "".join(f'<th scope="col">{html.escape(str(c))}</th>' for c in table.columns)
    body = "".join(
        "<tr>" + "".join(f"<td{_alignment(v)}>{html.escape(_cell(v))}</td>" for v in row) + "</tr>"
        for row in table.itertuples(index=False)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _alignment(value: object) -> str:
    return ' class="number"' if _is_number(value) else ""


def _cell(value: object) -> str:
    if value is None or value is pd.NA:
        return ""
    if isinstance(value, float):
        if value != value:
            return ""
        return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"
    return str(value)


_STYLE = """
:root { color-scheme: light; }
body {
  font: 16px/1.5 Helvetica, Arial, sans-serif; color: #1a1a1a;
  margin: 0 auto; max-width: 1180px; padding: 0 16px 48px;
}
h1 { font-size: 1.7em; margin: 1em 0 .4em; }
h2 { font-size: 1.25em; margin: 2em 0 .4em; border-top: 1px solid #ddd; padding-top: 1em; }
p, li { max-width: 50em; }
nav ol { columns: 2; }
figure { margin: 1em 0 2em; overflow-x: auto; }
figcaption { color: #444; margin: .3em 0; max-width: 60em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88em; margin: .5em 0 1em; }
th, td { border-bottom: 1px solid #e4e4e4; padding: 4px 10px 4px 0; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #999; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
a { color: #00509d; }
@media (max-width: 640px) { nav ol { columns: 1; } }
"""

_DRAW = """
(async () => {
  const unpack = async element => {
    const bytes = Uint8Array.from(atob(element.textContent), c => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const library = document.createElement("script");
  library.textContent = await unpack(document.getElementById("plotly-js"));
  document.head.append(library);
  for (const figure of document.querySelectorAll("script[data-plot]")) {
    const { data, layout } = JSON.parse(await unpack(figure));
    Plotly.newPlot(figure.dataset.plot, data, layout, { responsive: true, displaylogo: false });
  }
})();
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>{{ style | markup }}</style>
<script type="application/octet-stream" id="plotly-js">{{ plotly_js | markup }}</script>
</head>
<body>
<h1>{{ title }}</h1>
{% for line in summary %}
<p>{{ line }}</p>
{% endfor %}
<nav aria-label="Contents"><ol>
{% for section in sections %}
<li><a href="#{{ section.id }}">{{ section.title }}</a></li>
{% endfor %}
</ol></nav>
{% for section in sections %}
<section id="{{ section.id }}">
<h2>{{ section.title }}</h2>
{% for line in section.text %}
<p>{{ line }}</p>
{% endfor %}
{% for caption, id, figure in section.figures %}
<figure><figcaption>{{ caption }}</figcaption><div id="{{ id }}" class="plot"></div>
<script type="application/octet-stream" data-plot="{{ id }}">{{ figure | markup }}</script></figure>
{% endfor %}
{% for caption, table in section.tables %}
<p>{{ caption }}</p>
<div class="scroll" tabindex="0">{{ table | markup }}</div>
{% endfor %}
</section>
{% endfor %}
<script>{{ draw | markup }}</script>
</body>
</html>
"""
