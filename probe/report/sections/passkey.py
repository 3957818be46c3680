"""Passkeys: a key hidden in a long text."""

import pandas as pd
import plotly.graph_objects as go

from probe.report import extrapolation
from probe.report.drawing import interval
from probe.report.extrapolation import over_depths
from probe.report.page import Line, Section
from probe.report.sections.base import Figures, Part, Results, shown
from probe.report.sections.beyond import LINES, by_length, in_words, trained


def figures(results: Results) -> dict[str, go.Figure]:
    rows, found = results.rows, {}
    passkeys = results.of("passkey", metric="exact_match")
    if passkeys.empty:
        return {}
    length = results.trained_or_least(passkeys["length"])
    if len(passkeys) > len(over_depths(rows)):
        found["passkey"] = extrapolation.plot_passkey_map(rows, length)
    if len(over_depths(rows)):
        found["passkey_lengths"] = extrapolation.plot_passkey_by_length(rows, length)
    return found


def section(results: Results, drawn: Figures) -> Section:
    captions = {
        "passkey_lengths": f"Exact match against the length, all depths together. {LINES}",
        "passkey": (
            "Exact match by length and by the depth of the key, each variant made for the shortest extension that "
            "reaches the length. Right of the upright line: beyond the trained length. Hover for intervals and prompts."
        ),
    }
    table = passkey_table(results.rows)
    return Section(
        "Passkeys",
        [
            "A key of digits stands at some depth in a text, and is to be said at its end (Mohtashami & Jaggi 2023; "
            "Wang et al. 2024, section 4.3). Exact match is the share of prompts for which the whole key and nothing "
            "else is said; depth is the share of the text in front of the key. Prompts are the same for every model. "
            "A key that is found far beyond the trained length shows that the model reads so far; one that is not may "
            "be lost in reading or in writing it down. Bars and brackets are 95 % Wilson intervals over prompts, wide "
            "in a single cell; one training seed. Guessing five digits is right once in 100 000."
        ],
        figures=shown(drawn, captions),
        tables=[("Exact match by length, all depths together.", table)] if len(table) else [],
    )


def lines(results: Results) -> list[Line]:
    rows = over_depths(results.rows)
    if rows.empty:
        return []
    said = in_words(rows, "length", results.train_length, interval, least=False)
    text = f"The share said right, 95 % Wilson over prompts; one training seed{trained(results)}."
    return [Line("Passkeys", text, said)]


def passkey_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The share of keys said right and its interval, one row per model, variant and extension, a column a length."""
    return by_length(over_depths(rows), "length", interval)


PART = Part(("passkey",), figures, section, lines)
