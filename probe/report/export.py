"""Figures -> pictures at the width of a column of print, and figures out of a page that has them."""

import base64
import gzip
import html
import importlib.util
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from probe.errors import ProbeError
from probe.progress import OnProgress, Steps, untold
from probe.report.style import FONT, at_width, least_width

FORMATS = ("png", "svg", "pdf")
MM = 96 / 25.4  # CSS pixels
POINT = 96 / 72
TEXT = 7  # points: the size of text in print, where the width lets it
AT_ONCE = 8  # figures that a browser is given before it is told how far it is

_FIGURE = re.compile(r'<script [^>]*data-plot="[^"]*" data-file="([^"]*)"[^>]*>([A-Za-z0-9+/=]*)</script>')


def figures_of(page: str) -> dict[str, go.Figure]:
    """The figures of a page that ``render_page`` made, by names that files can have; numbered where two are alike.

    Raises:
        ProbeError: where the page has none.
    """
    found: dict[str, go.Figure] = {}
    for told, packed in _FIGURE.findall(page):
        name = re.sub(r"[^\w.-]+", "-", html.unescape(told)).lstrip(".-") or "figure"
        name = next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(found) + 3))) if n not in found)
        found[name] = go.Figure(json.loads(gzip.decompress(base64.b64decode(packed))))
    if not found:
        raise ProbeError("the page has no figures that can be read: a report of this toolkit is wanted")
    return found


def standalone(figures: Mapping[str, go.Figure]) -> dict[str, str]:
    """The figures as HTML files by name, and the one script that they all want beside them."""
    # One of plotly's buttons sends the figure to its maker's server.
    options = {"displaylogo": False, "modeBarButtonsToRemove": ["sendChartToCloud", "sendDataToCloud"]}
    pages = {
        f"{name}.html": figure.to_html(include_plotlyjs="directory", config=options) for name, figure in figures.items()
    }
    return {**pages, "plotly.min.js": get_plotlyjs()}


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
    if unknown := [each for each in formats if each not in FORMATS]:
        raise ProbeError(f"formats are {', '.join(FORMATS)}, got {', '.join(unknown)}")
    if not (20 <= width <= 2000 and 30 <= dpi <= 2400):
        raise ProbeError(f"width must be 20 to 2000 mm and dpi 30 to 2400, got {width:g} and {dpi}")
    if importlib.util.find_spec("kaleido") is None:
        raise ProbeError("pictures want kaleido and a browser: pip install 'position-probe[figures]'")
    names = list(figures)
    found: dict[str, bytes] = {}
    steps = Steps(len(names), on_progress)
    for start in range(0, len(names), AT_ONCE):
        sized = {name: print_size(figures[name], width)[:2] for name in names[start : start + AT_ONCE]}
        found |= _drawn([(name, kind, *sized[name]) for name in sized for kind in formats], width * MM, dpi)
        for _ in sized:
            steps.step()
    return found


def _drawn(jobs: Sequence[tuple[str, str, go.Figure, float]], pixels: float, dpi: int) -> dict[str, bytes]:
    """Files by name: each job has a name, a format, a figure and the pixels that it is laid out for."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.{kind}" for i, (_, kind, *_) in enumerate(jobs)]
        try:
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
