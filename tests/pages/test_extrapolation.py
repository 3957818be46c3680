"""Every number on docs/extrapolation.md comes from its rows, or is said here to be a setting or a published one."""

import math

import pandas as pd
import pytest
from page_numbers import ROOT, Page, between, short, with_interval

from probe.study.config import PRESETS

CONTEXTS = (256, 512, 1024, 2048)
EXTENSIONS = (2, 4, 8)
#: The rows of the table: the model, and the variant with a fit for every length or with none.
LINES = {
    "NoPE": ("none", "none"),
    "λ = {} for all heads, fitted at 2×, 4×, 8×": ("none", "uniform"),
    "λ of every head, trained at 2×, 4×, 8×": ("none", "head"),
    "λ = 1 + {} ln(n / 256) by the query's position": ("none", "log_length"),
    "rotary": ("rotary", "none"),
    "λ = {} for all heads": ("rotary", "uniform"),
    "position interpolation, factor 2, 4, 8": ("rotary", "linear"),
    "NTK-aware, factor 2, 4, 8": ("rotary", "ntk"),
    "YaRN, factor 2, 4, 8": ("rotary", "yarn"),
    "rotary dropped (DroPE), 450 steps more": ("rotary", "dropped"),
    "the same with λ = {}": ("rotary", "dropped_uniform"),
}

NOT_MEASURED = {
    "the corpus and how it is measured": [
        "260 tokens (bytes)",
        "sequences of 256 tokens",
        "9.7 million bytes",
        "32 texts of 2,046 bytes",
        "100 passkey prompts",
        "32 texts and 10 prompts a cell",
    ],
    "lengths and definitions": [
        "256 (1×) | 512 (2×) | 1,024 (4×) | 2,048 (8×)",
        *("1×", "2×", "4×", "8×", "1 + a ln", "λ ≥ 1", "an initial value of 1,"),
    ],
    "the paper's table and laws": [
        "Wang et al. 2024, tables for PG19 (2k/4k/8k/16k): NoPE 14.6/327/>1e3/>1e3; λ = 1.2 15.0/16.0/514/>1e3; "
        "HeadScale-8k 15.7/15.3/21.1/722.",
        "their 1 + .40 ln s, R² .98",
        "The paper has 81, 53 without the limit and 26 without the initial value. There 704 numbers",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return pd.read_parquet(ROOT / "docs" / "extrapolation" / "rows.parquet")


def three(value):
    return short(value, 2 if value < 9.995 else 1)


class Cells:
    """A number by model, variant, the length of its fit (missing without one) and the context."""

    def __init__(self, rows):
        perplexity = rows[rows["measurement"] == "perplexity"]
        keys = rows[(rows["measurement"] == "passkey") & (rows["metric"] == "exact_match") & rows["depth"].isna()]
        keys = keys.assign(context=keys["length"].astype(float), metric="keys")
        of = pd.concat([perplexity, keys], ignore_index=True)
        of["extension"] = of["extension"].fillna(0)
        self.rows = of.set_index(["metric", "encoding", "variant", "extension", "context"]).sort_index()

    def row(self, metric, encoding, variant, extension, times):
        return self.rows.loc[(metric, encoding, variant, extension, 256.0 * times)]

    def perplexity(self, *key):
        return self.row("perplexity", *key)["value"]

    def keys(self, *key):
        return self.row("keys", *key)["value"]

    def fitted(self, encoding, variant):
        """The fits of the columns: that for 2× at 1×, and at every other length its own."""
        has_fits = (self.rows.loc[("perplexity", encoding, variant)].index.get_level_values("extension") > 0).all()
        return [(encoding, variant, e if has_fits else 0, times) for e, times in zip((2, 2, 4, 8), (1, 2, 4, 8))]  # noqa: B905


def scales(rows, encoding, variant):
    of = rows[(rows["measurement"] == "head_scale") & (rows["encoding"] == encoding) & (rows["variant"] == variant)]
    return of.groupby("extension")["value"].mean()


def law(rows, encoding, variant):
    of = rows[(rows["measurement"] == "scale_law") & (rows["encoding"] == encoding) & (rows["variant"] == variant)]
    return of.set_index("metric").loc["slope"], of.set_index("metric").loc["r2", "value"]


def settings(rows):
    study = PRESETS["text"]
    training = study.training
    yield "{n_layers} layers, d_model {d_model}, {n_heads} heads".format(**study.model)
    yield f"{training.steps:,} steps of {training.batch_size}"
    whole = rows[(rows["measurement"] == "accuracy") & (rows["split"] == "validation") & rows["length"].isna()]
    right = whole.set_index("encoding")["value"]
    yield (
        f"said right in {short(right['none'], 3)} (NoPE) and {short(right['rotary'], 3)} (rotary) of "
        f"{int(whole['n'].iloc[0])} prompts"
    )


def table(rows):
    cells = Cells(rows)
    for name, (encoding, variant) in LINES.items():
        if variant == "log_length":
            name = name.format(short(law(rows, "none", "uniform")[0]["value"]))
        elif "{}" in name:
            name = name.format(", ".join(short(x) for x in scales(rows, encoding, variant)))
        values = [f"{three(cells.perplexity(*c))}, {short(cells.keys(*c))}" for c in cells.fitted(encoding, variant)]
        yield f"| {name} | {' | '.join(values)} |"
    of = cells.rows.reset_index()
    perplexity, keys = of[of["metric"] == "perplexity"], of[of["metric"] == "keys"]
    below, above = (abs(perplexity[end] / perplexity["value"] - 1) for end in ("low", "high"))
    least, most = min(below.min(), above.min()), max(below.max(), above.max())
    yield f"Intervals of perplexity reach {100 * least:.0f} to {100 * most:.0f} % to either side"
    yield f"those of keys at most ±{short(((keys['high'] - keys['low']) / 2).max())};"


def repaired(rows):
    """What a temperature does for NoPE."""
    cells = Cells(rows)
    none, one = ("none", "none", 0), ("none", "uniform", 2)
    uniform = scales(rows, "none", "uniform")
    yield (
        f"At twice the length {100 * cells.keys(*none, 2):.0f} of 100 keys is found, and "
        f"{100 * cells.keys(*one, 2):.0f} with λ = {short(uniform[2])} for all heads; "
        f"{100 * cells.keys('none', 'uniform', 4, 2):.0f} with the λ that was fitted to four times"
    )
    yield f"falls from {three(cells.perplexity(*none, 2))} to {short(cells.perplexity(*one, 2), 1)}."
    gains = [-cells.row("loss_change", "none", "head", e, e)[["value", "high", "low"]] for e in EXTENSIONS]
    two, four, eight = [f"{short(g['value'])} {between(g['high'], g['low'])}" for g in gains]
    yield f"by {two.replace(' [', ' nats a byte [')} and {four}, paired over texts; at 8× by {eight}"
    assert all(cells.perplexity("none", "head", e, e) < cells.perplexity("none", "uniform", e, e) for e in EXTENSIONS)
    head, all_heads = (100 * cells.row("keys", "none", v, 4, 4)[["value", "low", "high"]] for v in ("head", "uniform"))
    yield (
        f"finds {head['value']:.0f} {between(head['low'], head['high'], 0)} keys at 4× where that finds "
        f"{all_heads['value']:.0f} {between(all_heads['low'], all_heads['high'], 0)}"
    )
    within = [cells.perplexity("none", v, e, 1) for v in ("uniform", "head") for e in EXTENSIONS]
    assert {short(x, 1) for x in (within[0], within[3])} == {"5.3"}
    others = [within[i] for i in (1, 2, 4, 5)]
    yield (
        f"({three(cells.perplexity(*none, 1))} becomes {short(within[0], 1)} with the λ for 2×, {min(others):.0f} to "
        f"{max(others):.0f} with"
    )


def entropy(rows):
    of = rows[(rows["measurement"] == "entropy_rise") & (rows["metric"] == "entropy_rise") & (rows["extension"] == 8)]
    by_layer = of.groupby("layer")["value"].mean()
    more = math.log(8)
    assert (by_layer.loc[2:] > 2 * more).all() and len(by_layer) == 4
    yield f"rises by {short(by_layer.min(), 1)} to {short(by_layer.max(), 1)} nats"
    yield f"twice the ln 8 = {short(more)} that"
    of = rows[(rows["measurement"] == "scale_entropy") & (rows["metric"] == "spearman")].set_index("extension")
    two, four, eight = (with_interval(of.loc[e]) for e in EXTENSIONS)
    (n,) = of["n"].unique()
    yield f"here one for each of {n:.0f} heads"
    yield f"Spearman {two} at 2×, {four} at 4×, {eight} at 8×, over {n:.0f} heads"


def against_the_paper(rows):
    cells = Cells(rows)
    lost = [cells.keys("none", "head", e, 1) for e in EXTENSIONS]
    yield f"{short(cells.keys('none', 'none', 0, 1))} becomes {', '.join(short(x) for x in lost)} with the fits"
    uniform, found = (
        scales(rows, "none", "uniform"),
        100 * cells.row("keys", "none", "uniform", 8, 4)[["value", "low", "high"]],
    )
    assert found["value"] > max(100 * cells.keys("none", v, 4, 4) for v in ("uniform", "head"))
    yield (
        f"A uniform λ of {short(uniform[8])} keeps {short(cells.keys('none', 'uniform', 8, 1))} there and finds more "
        f"at 4× ({found['value']:.0f} {between(found['low'], found['high'], 0)})"
    )
    (slope, r2), (of_heads, r2_heads) = law(rows, "none", "uniform"), law(rows, "none", "head")
    means = ", ".join(short(x) for x in scales(rows, "none", "head"))
    yield (
        f"uniform λ has slope {with_interval(slope)}, R² {short(r2)}, the mean over heads ({means}) "
        f"{with_interval(of_heads)}, R² {short(r2_heads)},"
    )
    best = cells.rows.loc["keys"].xs(2048.0, level="context")["value"].max()
    yarn = short(cells.perplexity("rotary", "yarn", 8, 8), 1)
    yield f"{100 * best:.0f} of 100 keys at best, though YaRN's perplexity there is {yarn}"


def limits(rows):
    cells = Cells(rows)
    dropped, longer = ("rotary", "dropped", 0), ("rotary", "dropped_uniform", 8)
    yield f"on for {PRESETS['text'].training.steps // 10} steps, a tenth"
    yield (
        f"(perplexity {short(cells.perplexity(*dropped, 1), 1)} at the trained length, "
        f"{short(cells.perplexity('rotary', 'none', 0, 1), 1)} before); it goes further all the same "
        f"({three(cells.perplexity(*dropped, 8))} at 8×, {three(cells.perplexity(*longer, 8))} with λ = "
        f"{short(scales(rows, 'rotary', 'dropped_uniform')[8])}, {three(cells.perplexity('rotary', 'none', 0, 8))} "
        "without)"
    )


SECTIONS = (settings, table, repaired, entropy, against_the_paper, limits)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_the_page_says_what_its_rows_say(section, rows):
    Page("extrapolation.md").says(*section(rows))


def test_no_number_is_from_elsewhere(rows):
    page = Page("extrapolation.md")
    for section in SECTIONS:
        page.says(*section(rows))
    assert page.rest(NOT_MEASURED) == []
