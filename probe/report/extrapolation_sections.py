"""What a page says about what lies beyond the trained length: perplexity, attention temperatures, passkeys."""

from collections.abc import Callable, Mapping

import pandas as pd
import plotly.graph_objects as go

from probe.report import extrapolation
from probe.report.drawing import interval
from probe.report.extrapolation import over_depths, told
from probe.report.page import Line, Section
from probe.report.scales import (
    PUBLISHED_SLOPE,
    SPLITS,
    TEMPERATURES,
    beside_entropy,
    plot_entropy_by_position,
    plot_loss_by_temperature,
    plot_scale_against_entropy,
    plot_scale_law,
    plot_scale_map,
)
from probe.report.style import named
from probe.report.tables import interval_of, of
from probe.report.variants import VARIANTS, matched, ordered

ROW = ["encoding", "variant", "made for"]
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


def extrapolation_figures(rows: pd.DataFrame, train_length: int) -> dict[str, go.Figure]:
    """The figures of what was measured, by name; of what was not measured there is none."""
    passkeys = of(rows, "passkey", metric="exact_match")
    found: dict[str, go.Figure] = {}
    if len(of(rows, "perplexity", metric="perplexity")):
        found["perplexity"] = extrapolation.plot_perplexity_by_context(rows, train_length)
    if len(of(rows, "loss_by_position")):
        found["loss_by_position"] = extrapolation.plot_loss_by_position(rows, train_length)
    if len(passkeys) > len(over_depths(rows)):
        found["passkey"] = extrapolation.plot_passkey_map(rows, train_length)
    if len(over_depths(rows)):
        found["passkey_lengths"] = extrapolation.plot_passkey_by_length(rows, train_length)
    scales = of(rows, "head_scale", metric="scale")
    if len(scales) and (scales["variant"] == "head").any():
        found["scale_map"] = plot_scale_map(rows)
    if len(scales) and scales["extension"].notna().any():
        found["scale_law"] = plot_scale_law(rows)
    if len(of(rows, "scaled_entropy", metric="entropy")):
        found["entropy_by_position"] = plot_entropy_by_position(rows, train_length)
    if len(beside_entropy(rows)):
        found["scale_entropy"] = plot_scale_against_entropy(rows)
    temperatures = of(rows, "temperature")
    if len(temperatures) and temperatures["metric"].isin(list(TEMPERATURES)).any():
        found["temperature"] = plot_loss_by_temperature(rows)
    return named(found)


def extrapolation_sections(rows: pd.DataFrame, drawn: Mapping[str, go.Figure]) -> list[Section]:
    """The sections of what was measured."""
    sections = [_beyond(rows, drawn), _scales(rows, drawn), _passkeys(rows, drawn)]
    return [section for section in sections if section.figures or section.tables]


def extrapolation_summary(rows: pd.DataFrame, train_length: int | None = None) -> list[Line]:
    """Perplexity and passkeys, as the models are and by the best of their variants, in words: at the trained length and
    at the longest, where each variant is the one made for it. Without a trained length it is the shortest that was
    measured, and the best of all variants."""
    lines, trained = [], "" if train_length is None else f"; trained length {train_length}"
    perplexity = of(rows, "perplexity", metric="perplexity")
    if len(perplexity):
        said = _in_words(perplexity, "context", train_length, told, least=True)
        lines.append(Line("Perplexity", f"Of a token, 95 % over texts; one training seed{trained}.", said))
    passkeys = over_depths(rows)
    if len(passkeys):
        said = _in_words(passkeys, "length", train_length, interval, least=False)
        lines.append(
            Line("Passkeys", f"The share said right, 95 % Wilson over prompts; one training seed{trained}.", said)
        )
    return lines


def perplexity_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Perplexity and its interval, a row an encoding, variant and extension, a column a context."""
    return _by_length(of(rows, "perplexity", metric="perplexity"), "context", told)


def passkey_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The share of keys said right and its interval, a row an encoding, variant and extension, a column a length."""
    return _by_length(over_depths(rows), "length", interval)


def temperature_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The uniform λ of the least loss, a row an encoding and split, with what it changes from λ = 1, paired."""
    loss = of(rows, "temperature", metric="loss").reset_index(drop=True)
    columns = ["encoding", "sequences", "best λ", "change of loss, nats", "change of exact match"]
    if loss.empty:
        return pd.DataFrame(columns=columns)
    changes = [
        of(rows, "temperature", metric=metric).set_index(["encoding", "split", "scale"])
        for metric in ("loss_change", "exact_match_change")
    ]
    best = loss.loc[loss.groupby(["encoding", "split"], sort=False)["value"].idxmin()]
    found = []
    for r in best.itertuples():
        key = (r.encoding, r.split, r.scale)
        cells = [interval_of(change.loc[key]) if key in change.index else "" for change in changes]
        found.append((r.encoding, SPLITS.get(r.split, r.split), f"{r.scale:g}", *cells))
    return pd.DataFrame(found, columns=columns)


def _beyond(rows: pd.DataFrame, drawn: Mapping[str, go.Figure]) -> Section:
    captions = {
        "perplexity": "Perplexity against the context.",
        "loss_by_position": "Loss against the position in the longest text, nats a token.",
    }
    table = perplexity_table(rows)
    return Section(
        "Beyond the trained length",
        [
            "Perplexity is exp of the mean loss a token, in nats, on held-out texts: every context is scored on the "
            "same texts, in windows of so many tokens. A model that uses what lies further back gets better as the "
            "context grows; one that fails beyond the trained length gets worse. That it does not get worse does not "
            "say that it uses the longer context: it may look at the nearest tokens alone. For that see the passkeys. "
            "Bars, bands and brackets are 95 % bootstrap over texts; one training seed, so they say nothing about "
            "other seeds.",
            VARIANTS_IN_WORDS,
        ],
        figures=[(f"{caption} {LINES}", drawn[name]) for name, caption in captions.items() if name in drawn],
        tables=[("Perplexity a token by context, in tokens.", table)] if len(table) else [],
    )


def _scales(rows: pd.DataFrame, drawn: Mapping[str, go.Figure]) -> Section:
    captions = {
        "temperature": "Loss and exact match against one λ for the whole model.",
        "scale_law": "λ against the factor s by which the context is longer than the trained length.",
        "scale_map": "λ of every head; white is 1, no change.",
        "entropy_by_position": "Entropy of attention in nats, means over heads. Upright: the trained length.",
        "scale_entropy": "λ of every head against the rise of its entropy from the trained length to the extension.",
    }
    table = temperature_table(rows)
    return Section(
        "Attention temperature",
        [
            "softmax(λ q·k / √d): the more keys, the flatter a softmax of given scores, up to the entropy ln n of "
            "uniform attention over n keys; λ above 1 sharpens it again. Wang et al. 2024 (section 3) find "
            f"one λ that grows as 1 + a ln s, a = {PUBLISHED_SLOPE} (R² 0.977, one model without "
            "position encoding), and better ones trained for every head. λ is fitted on sequences of the length to "
            "reach and scored on others.",
            "What this cannot show: λ trained by gradients is one of many that do as well, so a single head's has no "
            "interval here; a law through few extensions fits easily; a correlation over heads (95 % bootstrap over "
            "heads, which are not independent) does not say that entropy is what λ mends. One training seed.",
        ],
        figures=[(caption, drawn[name]) for name, caption in captions.items() if name in drawn],
        tables=[
            (
                "The uniform λ of least loss, and the change from λ = 1 on the same sequences (95 % bootstrap, "
                "paired). It was picked on them, too: the change is the most that it could be.",
                table,
            )
        ]
        if len(table)
        else [],
    )


def _passkeys(rows: pd.DataFrame, drawn: Mapping[str, go.Figure]) -> Section:
    captions = {
        "passkey_lengths": f"Exact match against the length, all depths together. {LINES}",
        "passkey": (
            "Exact match by length and by the depth of the key, each variant made for the shortest extension that "
            "reaches the length. Right of the upright line: beyond the trained length. Hover for intervals and prompts."
        ),
    }
    table = passkey_table(rows)
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
        figures=[(caption, drawn[name]) for name, caption in captions.items() if name in drawn],
        tables=[("Exact match by length, all depths together.", table)] if len(table) else [],
    )


def _by_length(rows: pd.DataFrame, at: str, say: Callable[[float, float, float], str]) -> pd.DataFrame:
    """A row an encoding, variant and extension, a column a length."""
    if rows.empty:
        return pd.DataFrame(columns=ROW)
    lengths = sorted(set(rows[at].astype(int)))
    found = []
    for encoding in dict.fromkeys(rows["encoding"]):
        of_encoding = rows[rows["encoding"] == encoding]
        for variant in ordered(of_encoding["variant"]):
            part = of_encoding[of_encoding["variant"] == variant]
            for extension, line in part.groupby("extension", dropna=False):
                cells = {int(r[at]): interval_of(r, say) for r in line.to_dict("records")}
                made = "" if pd.isna(extension) else f"{extension:g}×"
                found.append([encoding, VARIANTS.get(variant, variant), made, *(cells.get(n, "") for n in lengths)])
    return pd.DataFrame(found, columns=[*ROW, *(f"{n} tokens" for n in lengths)])


def _in_words(
    rows: pd.DataFrame, at: str, train_length: int | None, say: Callable[[float, float, float], str], *, least: bool
) -> list[str]:
    """Each encoding at the trained length and at the longest, as it is, and there by its best matched variant."""
    lengths = sorted(set(rows[at].astype(int)))
    rows, near = rows.reset_index(drop=True), lengths[0]
    if train_length is not None:
        near = max((n for n in lengths if n <= train_length), default=near)
        rows = matched(rows, train_length, at)
    said = []
    for encoding, part in rows.groupby("encoding", sort=False):
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
