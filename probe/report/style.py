"""How figures look: one template, one colour and one mark for each encoding, panels laid out in pixels.

A figure is made by ``panels(…)``, filled, and ended by ``finish(…)``, which gives it a height, room below for its
legend, and the template. ``at_width(…)`` lays a finished figure out anew for another width, that of a column of print.
"""

import html
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
import plotly.io
from plotly.colors import sequential
from plotly.subplots import make_subplots


class Look(NamedTuple):
    """What an encoding is known by: colour and mark together are one encoding's alone."""

    colour: str
    symbol: str


# Okabe and Ito's palette for the six that are compared most, Paul Tol's "muted" for the others. Fifteen colours cannot
# all be told apart by everybody: those that cannot have other marks (the tests simulate three colour blindnesses).
#: Colour and mark of every encoding, by its name.
LOOKS = {
    "none": Look("#000000", "circle"),
    "learned": Look("#E69F00", "square"),
    "sinusoidal": Look("#CC79A7", "diamond"),
    "t5": Look("#0072B2", "triangle-up"),
    "alibi": Look("#D55E00", "triangle-down"),
    "rotary": Look("#009E73", "cross"),
    "alibi_learned": Look("#CC6677", "x"),
    "alibi_keys": Look("#661100", "triangle-left"),
    "transformer_xl": Look("#332288", "pentagon"),
    "fire": Look("#56B4E9", "star"),
    "kerple": Look("#882255", "hexagon"),
    "sandwich": Look("#999933", "hourglass"),
    "xpos": Look("#44AA99", "bowtie"),
    "cope": Look("#AA4499", "star-square"),
    "randomized": Look("#6699CC", "diamond-wide"),
}
# Names that no encoding has (models that others trained) take theirs by a checksum: the same in every figure.
OTHER_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#882255", "#117733")
OTHER_SYMBOLS = ("circle", "square", "diamond", "cross", "x", "star", "triangle-up")
GREY, PALE = "#777777", "#BBBBBB"  # what is no model's own: controls, bounds, zero lines
STRONG, BLUE = "#D55E00", "#0072B2"  # a mark on a figure; one line among controls

DASHES = {"none": "solid", "untrained": "dash", "embedding": "dot", "shuffled": "dashdot", "random": "longdash"}
CONTROL_LABELS = {
    "none": "trained model",
    "untrained": "untrained model",
    "embedding": "token embedding alone",
    "shuffled": "shuffled positions",
    "random": "random projection of the token",
}

# Most attention weights are small: the colours are spread by the square root, so that 0.05 can be told from 0.
ATTENTION_SCALE = [[(i / (len(sequential.Blues) - 1)) ** 2, shade] for i, shade in enumerate(sequential.Blues)]
BENEATH_TEXT = ["#ffffff", "#6baed6"]  # light enough for the numbers upon it
DIVERGING = {"colorscale": "RdBu", "reversescale": True}  # red above zero

TEMPLATE = "position"  #: the name of the figures' plotly template
FONT, SMALL = 13, 11  # px
WIDTH = 960  # px that legends are laid out for; figures take the width that they are given
TICKS, TITLE, LINE = 24, 26, 22  # px below a panel: labels of one line, the axis' title, a line of the legend


def _template() -> go.layout.Template:
    """plotly's ``simple_white`` with this toolkit's type, colours and room."""
    mine = go.layout.Template(plotly.io.templates["simple_white"])
    mine.layout.update(
        font={"family": "Helvetica, Arial, 'Liberation Sans', sans-serif", "size": FONT, "color": "#1a1a1a"},
        colorway=[look.colour for look in LOOKS.values()],
        margin={"l": 65, "r": 20, "t": 45, "b": 55},
        hoverlabel={"font": {"size": 12}},
        legend={"orientation": "h", "yanchor": "top", "x": 0},
        xaxis={"automargin": True, "title": {"standoff": 8, "font": {"size": 12}}},
        yaxis={"automargin": True, "title": {"standoff": 8, "font": {"size": 12}}},
    )
    return mine


plotly.io.templates[TEMPLATE] = _template()


def look(name: str) -> Look:
    """Colour and mark of an encoding, or of any other name; the same in every figure."""
    if name in LOOKS:
        return LOOKS[name]
    number = zlib.crc32(name.encode())
    return Look(nth_look(number).colour, nth_look(number // len(OTHER_COLOURS)).symbol)


def nth_look(i: int) -> Look:
    """A colour and a mark for the i-th of several things that are no encodings: sites, dtypes, components."""
    return Look(OTHER_COLOURS[i % len(OTHER_COLOURS)], OTHER_SYMBOLS[i % len(OTHER_SYMBOLS)])


def colour(name: str) -> str:
    """The colour of an encoding, or of any other name; the same in every figure."""
    return look(name).colour


def panels(
    titles: Sequence[Sequence[str]], *, height: int, most: int = 5, gap: int = 78, beside: float = 0.03,
    shared_y: bool = True,
) -> tuple[go.Figure, list[dict[str, int]]]:  # fmt: skip
    """Panels with titles (markup of plotly's: names go through ``plain``), and the place of each in their order.

    Every group of titles begins a row, and a row holds at most ``most``. ``height`` of a panel and ``gap`` between rows
    are pixels, ``beside``, between columns, is a share of the width. ``shared_y``: one vertical scale for all.
    """
    n_columns = min(most, max(map(len, titles)))
    lines = [group[i : i + n_columns] for group in titles for i in range(0, len(group), n_columns)]
    drawn = len(lines) * height + (len(lines) - 1) * gap
    figure = make_subplots(
        rows=len(lines),
        cols=n_columns,
        specs=[[{} if column < len(line) else None for column in range(n_columns)] for line in lines],
        subplot_titles=[title for line in lines for title in line],
        shared_yaxes="all" if shared_y else False,
        horizontal_spacing=beside,
        vertical_spacing=gap / drawn if len(lines) > 1 else 0,
    )
    figure.update_annotations(font_size=FONT)
    figure.layout.meta = {"drawn": drawn}
    return figure, [{"row": r, "col": c} for r, line in enumerate(lines, 1) for c, _ in enumerate(line, 1)]


def panel(height: int) -> go.Figure:
    """A figure of one panel without a title, so many pixels high."""
    return go.Figure(layout={"meta": {"drawn": height}})


def title_lowest(figure: go.Figure, places: Sequence[dict[str, int]], title: str) -> None:
    """A title below each panel that has none below it."""
    for place in places:
        if {"row": place["row"] + 1, "col": place["col"]} not in places:
            figure.update_xaxes(title_text=title, **place)


def colour_bar(title: str, figure: go.Figure, *, top: float = 1.0, share: float = 1.0) -> dict[str, Any]:
    """A colour bar of at most 300 pixels beside the top panels, or beside a ``share`` of them from ``top`` down."""
    length = min(300.0, share * figure.layout.meta["drawn"])
    text = {"title": {"text": title, "font": {"size": 12}}, "tickfont": {"size": SMALL}}
    return text | {"lenmode": "pixels", "len": length, "y": top, "yanchor": "top", "thickness": 14, "outlinewidth": 0}


def finish(figure: go.Figure, **layout: Any) -> go.Figure:
    """The template, and the height that panels, titles, tick labels and legend take; ``layout`` is added."""
    figure.update_layout(template=TEMPLATE, **layout)
    for axis in figure.select_yaxes():
        _break_title(axis, figure.layout.meta["drawn"])
    return at_width(figure, WIDTH)


def at_width(figure: go.Figure, width: float) -> go.Figure:
    """The figure with room for its legend where it is so many pixels wide; how high the panels are does not change."""
    drawn = (figure.layout.meta or {}).get("drawn")
    if drawn is None:  # a figure of somebody else's, on a page of ours
        return figure
    above, below = _above(figure), _below(figure)
    lines = _legend_lines(figure, width)
    figure.update_layout(
        height=drawn + above + below + lines * LINE,
        margin={"t": above, "b": below + lines * LINE},
        legend={"y": -below / drawn},
    )
    return figure


def named(figures: dict[str, go.Figure]) -> dict[str, go.Figure]:
    """The same figures, each with its name, under which a page and ``probe figures`` know it."""
    for name, figure in figures.items():
        figure.layout.meta = {**(figure.layout.meta or {}), "name": name}
    return figures


def least_width(figure: go.Figure) -> int:
    """Pixels below which a figure cannot be read, by the panels that it has side by side and their titles."""
    beside = {round(axis.domain[0], 3) for axis in figure.select_xaxes() if axis.domain is not None}
    titles = [line for a in figure.layout.annotations if _is_above(a) for line in a.text.split("<br>")]
    longest = max((len(html.unescape(re.sub("<[^>]*>", "", line))) for line in titles), default=0)
    return 60 + max(1, len(beside)) * max(180, int(6.3 * longest))


def _break_title(axis: go.layout.YAxis, drawn: float) -> None:
    """A vertical title that is longer than its panel has its n in a second line."""
    start, end = axis.domain or (0, 1)
    text = axis.title.text or ""
    if 6.2 * len(html.unescape(text)) > (end - start) * drawn and " (n = " in text:
        axis.title.text = "<br>(n = ".join(text.rsplit(" (n = ", 1))


def _above(figure: go.Figure) -> int:
    """Room for the titles of the top panels, and for what stands above a line."""
    titles = [a for a in figure.layout.annotations if a.text and a.y is not None and a.y > 0.999 and _is_above(a)]
    lines = max((a.text.count("<br>") + 1 for a in titles), default=0)
    raised = max((a.yshift or 0 for a in titles), default=0)
    return int(16 + 19 * lines + raised)


def _is_above(annotation: go.layout.Annotation) -> bool:
    return annotation.yanchor == "bottom" and str(annotation.yref).endswith(("paper", "domain"))


def _below(figure: go.Figure) -> int:
    """Room for the tick labels and the title of the lowest axes."""
    axes = [axis for axis in figure.select_xaxes() if not axis.anchor or _is_lowest(figure, axis)]
    title = TITLE if any(axis.title.text for axis in axes) else 6
    if all(axis.showticklabels is False for axis in axes):
        return 8 + title
    names = [str(x) for trace in figure.data for x in (trace.x if trace.x is not None else ()) if isinstance(x, str)]
    text = [html.unescape(str(t)) for axis in axes for t in (axis.ticktext or ())]
    slant = max((math.sin(math.radians(abs(axis.tickangle or 0))) for axis in axes), default=0)
    lines = 16 * max((t.count("<br>") for t in text), default=0)
    return int(max(TICKS + lines, 12 + 7.3 * slant * max(map(len, [*names, *text]), default=0))) + title


def _is_lowest(figure: go.Figure, axis: Any) -> bool:
    name = axis.anchor.replace("y", "yaxis")
    domain = figure.layout[name].domain
    return domain is None or domain[0] < 0.001


def _legend_lines(figure: go.Figure, width: float) -> int:
    """Lines of a legend across so many pixels: plotly gives all entries the width of the longest."""
    names = [t.name for t in figure.data if t.name and t.showlegend is not False]
    if len(names) < 2 and not figure.layout.showlegend:
        return 0
    across = max(1, int((width - 90) // (46 + 6.6 * max((len(html.unescape(n)) for n in names), default=1))))
    return -(-len(names) // across)
