"""Figures -> pictures at the width of a column of print, and figures out of a page that has them."""

import base64
import contextlib
import html
import importlib.util
import json
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from probe.config import check_number
from probe.errors import ProbeError
from probe.files import check_json_size, open_plain
from probe.limits import current
from probe.progress import OnProgress, Steps, untold
from probe.report.page import content_policy
from probe.report.style import FONT, at_width, least_width

FORMATS = ("png", "svg", "pdf")
MM = 96 / 25.4  # CSS pixels
POINT = 96 / 72
TEXT = 7  # points: the size of text in print, where the width lets it

MOST_NAME = 150  # characters of a figure's name: an ending goes behind it
TRACES = ("scatter", "heatmap", "bar")  # the kinds that reports are drawn with: none of them requests anything
ABROAD = ("images", "map", "mapbox", "geo")  # parts of a layout that may request something
_URL = re.compile(r"://|url\s*\(|href", re.IGNORECASE)

# The tag as the template of pages has it. Its length is bounded, so that no page takes long to search.
_FIGURE = re.compile(
    r'<script type="application/octet-stream" data-plot="[^"<>]{1,60}" data-file="([^"<>]{0,900})">([^<]*)</script>'
)
_SCRIPT = re.compile(r'<script(?: type="text/javascript")?>(.*?)</script>', re.DOTALL)


def read_page(path: Path) -> str:
    """The text of a page.

    Raises:
        ProbeError: where it is no plain file, or larger than any page.
    """
    most = current().read_page_bytes
    with open_plain(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ProbeError(f"{path}: must be a report of at most {most} bytes, got more")
    return content.decode("utf-8", "replace")


def figures_of(page: str) -> dict[str, go.Figure]:
    """The figures of a page that ``render_page`` made, by names that files can have; numbered where two are alike.

    Args:
        page: the HTML.

    Raises:
        ProbeError: where the page has none, or one that no report has: damaged, too large, of another kind than reports
            are drawn with, or with an address that drawing it could request.
    """
    found: dict[str, go.Figure] = {}
    tags = _FIGURE.findall(page)
    if len(tags) > (most := current().figures):
        raise ProbeError(f"the page must be a report with at most {most} figures, got {len(tags)}")
    for i, (told, packed) in enumerate(tags, start=1):
        name = re.sub(r"[^\w.-]+", "-", html.unescape(told)).lstrip(".-")[:MOST_NAME] or "figure"
        if len(name.encode()) > MOST_NAME:  # letters of several bytes
            name = "figure"
        name = next(n for n in (name, *(f"{name}-{j}" for j in range(2, len(found) + 3))) if n not in found)
        found[name] = _figure(packed, f"figure {i} of the page")
    if not found:
        raise ProbeError("the page has no figures that can be read: a report of this toolkit is wanted")
    return found


def _figure(packed: str, where: str) -> go.Figure:
    """A figure out of gzip in base64."""
    most = current().figure_bytes
    try:
        unpacker = zlib.decompressobj(wbits=31)  # gzip
        content = unpacker.decompress(base64.b64decode(packed, validate=True), most + 1)
        if len(content) > most:
            raise ProbeError(f"{where} must have at most {most} bytes, got more")
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError("the data are cut off or too long")
        check_json_size(content, where)
        values = json.loads(content)
        _check_figure(values)
        figure = go.Figure(values)
        print_size(figure, 174)
        return figure
    except ProbeError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError, zlib.error) as error:
        reason = (str(error).strip().splitlines() or ["it cannot be read"])[0]
        raise ProbeError(
            f"{where} must be one that this toolkit drew, got another or a damaged one: {reason}"
        ) from None


def _check_figure(values: Any) -> None:
    """Refuse what no report of ours has.

    Raises:
        ValueError: says what it is.
    """
    if not isinstance(values, dict) or not {"data"} <= values.keys() <= {"data", "layout"}:
        raise ValueError("it must be an object with data and layout")
    data, layout = values["data"], values.get("layout", {})
    if not isinstance(data, list) or not isinstance(layout, dict):
        raise ValueError("data must be a list and layout an object")
    for trace in data:
        if not isinstance(trace, dict) or trace.get("type") not in TRACES:
            raise ValueError(f"every trace must be one of {', '.join(TRACES)}")
    meta = layout.get("meta", {})
    if not isinstance(meta, dict) or not meta.keys() <= {"drawn", "name"}:
        raise ValueError("meta of the layout must be an object with drawn and name")
    if "drawn" in meta:
        check_number("drawn", meta["drawn"], 0, 10_000)
    for key in layout:
        if key.rstrip("0123456789") in ABROAD:
            raise ValueError(f"layout must be without {key!r}")
    waiting: list[Any] = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("images"):
                raise ValueError("layout must be without 'images'")
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and _URL.search(value):
            raise ValueError("it must be without addresses")


def standalone(figures: Mapping[str, go.Figure]) -> dict[str, str]:
    """The figures as HTML files by name, and the one script that they all want beside them."""
    # One of plotly's buttons sends the figure to its maker's server.
    options = {"displaylogo": False, "modeBarButtonsToRemove": ["sendChartToCloud", "sendDataToCloud"]}
    pages = {
        f"{name}.html": _closed(figure.to_html(include_plotlyjs="directory", config=options))
        for name, figure in figures.items()
    }
    return {**pages, "plotly.min.js": get_plotlyjs()}


def _closed(page: str) -> str:
    """A page that may run its own scripts and draw, and reach nothing else."""
    policy = content_policy(_SCRIPT.findall(page), beside=True)
    return page.replace("<head>", f'<head><meta http-equiv="Content-Security-Policy" content="{policy}" />', 1)


def print_size(figure: go.Figure, width: float) -> tuple[go.Figure, float, float]:
    """A figure laid out for so many millimetres: the figure, the pixels that it is laid out for, and the points that
    its text has in print: 7, or fewer where its panels need more room than that leaves them."""
    pixels = width * MM
    laid_out = max(pixels * FONT / (TEXT * POINT), least_width(figure))
    return at_width(go.Figure(figure), laid_out), laid_out, FONT * pixels / laid_out / POINT


def pictures(
    figures: Mapping[str, go.Figure], formats: Sequence[str] = FORMATS, *, width: float = 174, dpi: int = 300,
    on_progress: OnProgress = untold,
) -> dict[str, bytes]:  # fmt: skip
    """The figures as files by name, ``accuracy.pdf``: ``width`` millimetres wide, PNGs of ``dpi`` pixels an inch.

    174 mm is the width of two columns of most journals, 84 that of one. ``on_progress`` is called with how many figures
    are done.

    Raises:
        ProbeError: for an unknown format or an impossible size, or where kaleido or a browser is missing.
    """
    check_pictures(formats, width, dpi)
    if importlib.util.find_spec("kaleido") is None:
        raise ProbeError("pictures want kaleido and a browser: pip install 'position-probe[figures]'")
    names = list(figures)
    found: dict[str, bytes] = {}
    steps, at_once = Steps(len(names), on_progress), current().figures_at_once
    for start in range(0, len(names), at_once):
        sized = {name: print_size(figures[name], width)[:2] for name in names[start : start + at_once]}
        found |= _drawn([(name, kind, *sized[name]) for name in sized for kind in formats], width * MM, dpi)
        for _ in sized:
            steps.step()
    return found


def check_pictures(formats: Sequence[str], width: float, dpi: int) -> None:
    """Refuse what no picture can be, before anything is written.

    Raises:
        ProbeError: for an unknown format or an impossible size.
    """
    if unknown := [each for each in formats if each not in FORMATS]:
        raise ProbeError(f"formats are {', '.join(FORMATS)}, got {', '.join(unknown)}")
    if not (20 <= width <= 2000 and 30 <= dpi <= 2400):
        raise ProbeError(f"width must be 20 to 2000 mm and dpi 30 to 2400, got {width:g} and {dpi}")


def _drawn(jobs: Sequence[tuple[str, str, go.Figure, float]], pixels: float, dpi: int) -> dict[str, bytes]:
    """Files by name: each job has a name, a format, a figure and the pixels that it is laid out for."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.{kind}" for i, (_, kind, *_) in enumerate(jobs)]
        try:
            with _without_mathjax(Path(folder)):
                plotly.io.write_images(
                    [figure for *_, figure, _ in jobs],
                    files,
                    width=[laid_out for *_, laid_out in jobs],
                    height=[figure.layout.height for *_, figure, _ in jobs],
                    scale=[pixels / laid_out * (dpi / 96 if kind == "png" else 1) for _, kind, _, laid_out in jobs],
                )
        except RuntimeError as error:
            if "chrome" not in str(error).lower():
                raise
            raise ProbeError(
                "pictures want a browser, and there is none: apt install chromium, or plotly_get_chrome -y"
            ) from None
        return {f"{name}.{kind}": file.read_bytes() for (name, kind, *_), file in zip(jobs, files, strict=True)}


@contextlib.contextmanager
def _without_mathjax(folder: Path) -> Iterator[None]:
    """Inside, kaleido draws with an empty script in place of MathJax, which it would request from a server."""
    empty = folder / "empty.js"
    empty.write_text("")
    before, plotly.io.defaults.mathjax = plotly.io.defaults.mathjax, empty.as_uri()
    try:
        yield
    finally:
        plotly.io.defaults.mathjax = before
