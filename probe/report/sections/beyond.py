"""Perplexity and loss beyond the trained length."""

from collections.abc import Callable

import pandas as pd
import plotly.graph_objects as go

from probe.report import extrapolation
from probe.report.extrapolation import told
from probe.report.page import Line, Section
from probe.report.position import plot_loss_along_texts
from probe.report.sections.base import Figures, Part, Results, shown
from probe.report.tables import interval_of, of
from probe.report.variants import VARIANTS, matched, ordered

ROW = ["model", "variant", "made for"]
VARIANTS_IN_WORDS = (
    "Variants change a trained model so that it reaches further. Scales: attention is softmax(λ q·k / √d), with one λ "
    "(uniform), one trained λ a head (head), one λ a head found without gradients (searched), or λ = 1 + a ln(n / L) "
    "for a query that sees n > L keys (Wang et al. 2024). Of rotary angles: position interpolation (Chen et al. 2023), "
    "NTK-aware (bloc97 2023), YaRN (Peng et al. 2023). Encoding dropped: rotary angles are taken out and training goes "
    "on for some steps at the trained length (Gelberg et al. 2025)."
)
LINES = (
    "Thick: at each length, the variant made for the shortest extension that reaches it. Thin: made for another one. "
    "Dotted: the trained length."
)


def figures(results: Results) -> dict[str, go.Figure]:
    found: dict[str, go.Figure] = {}
    perplexity, loss = results.of("perplexity", metric="perplexity"), results.of("loss_by_position")
    if len(perplexity):
        length = results.trained_or_least(perplexity["context"])
        found["perplexity"] = extrapolation.plot_perplexity_by_context(results.rows, length)
        if len(loss):
            found["loss_by_position"] = extrapolation.plot_loss_by_position(results.rows, length)
    elif len(loss):
        found["loss_by_position"] = plot_loss_along_texts(loss)
    return found


def section(results: Results, drawn: Figures) -> Section:
    variants = results.rows["variant"].dropna() if "variant" in results.rows else []
    lines = f" {LINES}" if results.train_length is not None else ""
    table = perplexity_table(results.rows)
    text = [
        "Perplexity is exp of the mean loss a token, in nats, on held-out texts: every context is scored on the same "
        "texts, in windows of so many tokens. A model that uses what lies further back gets better as the context "
        "grows; one that fails beyond the trained length gets worse. That it does not get worse does not say that it "
        "uses the longer context: it may look at the nearest tokens alone. For that see the passkeys. Bars, bands and "
        "brackets are 95 % bootstrap over texts; one training seed, so they say nothing about other seeds."
    ]
    by_position = "The loss of a token by its place in the text: what a longer context is worth. 95 % bootstrap."
    if "perplexity" not in drawn:
        text = [by_position]
    elif any(variant != "none" for variant in variants):
        text.append(VARIANTS_IN_WORDS)
    return Section(
        "Beyond the trained length" if "perplexity" in drawn else "Loss by position",
        text,
        figures=shown(
            drawn,
            {
                "perplexity": f"Perplexity against the context.{lines}",
                "loss_by_position": f"Loss against the position in the longest text, nats a token.{lines}",
            },
        ),
        tables=[("Perplexity a token by context, in tokens.", table)] if len(table) else [],
    )


def lines(results: Results) -> list[Line]:
    """Perplexity at the trained length and at the longest, as the models are and by the best of their variants, each of
    which is the one made for that length. Without a trained length it is the shortest that was measured."""
    rows = results.of("perplexity", metric="perplexity")
    if rows.empty:
        return []
    said = in_words(rows, "context", results.train_length, told, least=True)
    return [Line("Perplexity", f"Of a token, 95 % over texts; one training seed{trained(results)}.", said)]


def trained(results: Results) -> str:
    return "" if results.train_length is None else f"; trained length {results.train_length}"


def perplexity_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Perplexity and its interval, one row per model, variant and extension, a column a context."""
    return by_length(of(rows, "perplexity", metric="perplexity"), "context", told)


def by_length(rows: pd.DataFrame, at: str, say: Callable[[float, float, float], str]) -> pd.DataFrame:
    """A row an encoding, variant and extension, a column a length."""
    if rows.empty:
        return pd.DataFrame(columns=ROW)
    lengths = sorted(set(rows[at].astype(int)))
    found = []
    for encoding in dict.fromkeys(rows["model"]):
        of_encoding = rows[rows["model"] == encoding]
        for variant in ordered(of_encoding["variant"]):
            part = of_encoding[of_encoding["variant"] == variant]
            for extension, line in part.groupby("extension", dropna=False):
                cells = {int(r[at]): interval_of(r, say) for r in line.to_dict("records")}
                made = "" if pd.isna(extension) else f"{extension:g}×"
                found.append([encoding, VARIANTS.get(variant, variant), made, *(cells.get(n, "") for n in lengths)])
    return pd.DataFrame(found, columns=[*ROW, *(f"{n} tokens" for n in lengths)])


def in_words(
    rows: pd.DataFrame, at: str, train_length: int | None, say: Callable[[float, float, float], str], *, least: bool
) -> list[str]:
    """Each encoding at the trained length and at the longest, as it is, and there by its best matched variant."""
    lengths = sorted(set(rows[at].astype(int)))
    rows, near = rows.reset_index(drop=True), lengths[0]
    if train_length is not None:
        near = max((n for n in lengths if n <= train_length), default=near)
        rows = matched(rows, train_length, at)
    said = []
    for encoding, part in rows.groupby("model", sort=False):
        unchanged = part[part["variant"] == "none"].set_index(at)
        words = [
            f"{interval_of(unchanged.loc[n], say)} at {n}"
            for n in dict.fromkeys((near, lengths[-1]))
            if n in unchanged.index
        ]
        line = f"{encoding} " + (", ".join(words) + " tokens as it is" if words else "")
        others = part[(part["variant"] != "none") & (part[at] == lengths[-1])]
        if len(others):
            best = others.loc[others["value"].idxmin() if least else others["value"].idxmax()]
            made = "" if pd.isna(best["extension"]) else f", made for {best['extension']:g}×"
            name = VARIANTS.get(best["variant"], best["variant"])
            with_it = f"{interval_of(best, say)} at {lengths[-1]} with the best of {len(others)} ({name}{made})"
            line += f"{', ' if words else ''}{with_it}"
        said.append(line.strip())
    return said


PART = Part(("perplexity", "loss_by_position"), figures, section, lines)
