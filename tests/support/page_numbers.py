"""The numbers on a page of the documentation: which of them a test has made again, and which are left.

A test makes sentences, lines of tables and parts of them out of rows, and the page must say them, digit for digit::

    page = Page("attention.md")
    page.says(f"is {short(row.value, 3)} to T5")
    assert page.rest(NOT_MEASURED) == []

``NOT_MEASURED`` holds, by reason, the parts of the page whose numbers no row can give: settings, names, citations.
"""

import re
from collections.abc import Iterable, Mapping
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[2]

#: 12, .134, −.014, 4,096, 1e-7, 10⁻⁵, 95 %, 0.5.8. Digits within a name (T5, W_1) are part of the name.
NUMBER = re.compile(
    r"(?<![\w.])[−-]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)*(?:e[−-]?\d+)?[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]*(?:\s%)?"
)
#: What a page is read without: blocks of code (but not of notes), and where links lead.
WITHOUT = re.compile(r"^```\w*\n(?s:.*?)^```$|(?<=\n\n)(?: {4}.*\n)+|(?<=\])\([^()\s]*\)", re.MULTILINE)
CODE_IN_A_LINE = re.compile(r"`[^`]+`")


def normal(text: str) -> str:
    """One space for all spaces and line breaks in a row; marks of bold and slanted print are left out."""
    return re.sub(r"\s+", " ", re.sub(r"\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)", "", text)).strip()


class Page:
    """A page that a test reads. Numbers in blocks of code and in `code` are settings and names: they don't count."""

    def __init__(self, name: str | Path, folder: Path = ROOT / "docs") -> None:
        self.raw = (folder / name).read_text(encoding="utf-8")
        self.text = normal(WITHOUT.sub("", self.raw))
        code = [each.span() for each in CODE_IN_A_LINE.finditer(self.text)]
        spans = [each.span() for each in NUMBER.finditer(self.text)]
        self.numbers = [s for s in spans if not any(start <= s[0] < end for start, end in code)]
        self.covered: set[tuple[int, int]] = set()

    def says(self, *snippets: str) -> None:
        """The page says each snippet, in one place alone, and the numbers of that place are accounted for.

        Raises:
            AssertionError: where it doesn't, where a snippet has too few words to be in one place, or none.
        """
        for snippet in snippets:
            places = self._places(snippet)
            assert places, f"the page does not say\n    {normal(snippet)}\nbut has\n    {self._nearest(snippet)}"
            assert len(places) == 1, f"{len(places)} places of the page say {normal(snippet)!r}: more words are wanted"
            self._cover(places)

    def rest(self, not_measured: Mapping[str, Iterable[str]] | None = None) -> list[str]:
        """All numbers that no snippet holds, each with what stands around it.

        ``not_measured`` are parts of the page by the reason why no row gives their numbers; they may stand in several
        places.

        Raises:
            AssertionError: where one of these parts is not on the page, or accounts for nothing.
        """
        for reason, snippets in (not_measured or {}).items():
            for snippet in snippets:
                before = len(self.covered)
                self._cover(self._places(snippet))
                assert len(self.covered) > before, f"{reason}: {snippet!r} is not on the page, or holds no number left"
        left = [span for span in self.numbers if span not in self.covered]
        return [f"{self.text[max(0, a - 40) : a]}>{self.text[a:b]}<{self.text[b : b + 40]}" for a, b in left]

    def _places(self, snippet: str) -> list[tuple[int, int]]:
        """Where a snippet stands without cutting a number: .13 is not in .134."""
        found = [each.span() for each in re.finditer(re.escape(normal(snippet)), self.text)]
        cut = [(a, b) for a, b in found for c, d in self.numbers if c < a < d or c < b < d]
        return [place for place in found if place not in cut]

    def _cover(self, places: list[tuple[int, int]]) -> None:
        self.covered |= {span for span in self.numbers for a, b in places if a <= span[0] and span[1] <= b}

    def _nearest(self, snippet: str) -> str:
        """The place of the page that has most of the snippet's words in a row, for the message."""
        wanted = normal(snippet)
        words = [each.start() for each in re.finditer(r"(?<!\S)\S", wanted)]
        starts = sorted(((self._common(wanted[at:]), at) for at in words), reverse=True)
        (length, at) = starts[0]
        place = self.text.find(wanted[at : at + length])
        return self.text[max(0, place - at) : place - at + len(wanted) + 20]

    def _common(self, text: str) -> int:
        """How much of the beginning of a text stands somewhere on the page."""
        return max((n for n in range(1, len(text) + 1) if text[:n] in self.text), default=0)


def rounded(value: float, digits: int) -> str:
    """Half up, so that a reader who rounds .225 of a table finds the page's .23, whatever the float is."""
    return str(Decimal(repr(round(float(value), 12))).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def short(value: float, digits: int = 2) -> str:
    """As the pages write numbers: .13, −.01, 1.05; ".00" is 0 or rounded to it, and has no sign."""
    text = rounded(abs(value), digits)
    sign = "−" if value < 0 and float(text) else ""
    return sign + (text[1:] if text.startswith("0.") else text)


def between(low: float, high: float, digits: int = 2) -> str:
    """An interval: [.11, .14]."""
    return f"[{short(low, digits)}, {short(high, digits)}]"


def with_interval(row: "pd.Series | Mapping[str, float]", digits: int = 2) -> str:
    """A row's value and interval: .13 [.11, .14]."""
    return f"{short(row['value'], digits)} {between(row['low'], row['high'], digits)}"


def percent(share: float, digits: int = 0) -> str:
    """A share as 7 %."""
    return f"{rounded(100 * share, digits)} %"


def power(value: float, digits: int = 0) -> str:
    """A small number as 5e-15, without the zero that Python writes into e-07."""
    return re.sub(r"e([-+])0?", lambda each: "e" + each[1].replace("+", ""), f"{value:.{digits}e}")


#: Numbers up to twelve in words.
NUMERALS = "no one two three four five six seven eight nine ten eleven twelve"
WORDS = tuple(NUMERALS.split(" "))
