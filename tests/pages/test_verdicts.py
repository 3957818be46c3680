"""Every number on docs/verdicts.md comes from the rows that lie beside it, or is said here to be an earlier one."""

import pandas as pd
import pytest
from page_numbers import ROOT, WORDS, Page, short

from constructions.known import TRAINED
from constructions.known.drawing import Draw
from constructions.known.interchange import ENFORCED
from constructions.known.plan import Plan
from constructions.known.trained import ESTIMATED
from probe.benchmark import VERDICTS, confusion, verdict_scores
from probe.benchmark.simulation import CONFIDENCE
from probe.benchmark.verdicts import SHARE, TIE

FOLDER = ROOT / "docs" / "verdicts"
NEGATIVE = {"steering_follows": "does not follow"}

NOT_MEASURED = {
    "what the models are": [
        "up to 300 times",
        "behind layer 0 is",
        "1 to 4 places",
        "et al. 2022",
        "et al. 2024",
    ],
    "what was measured with an earlier version, and cannot be made again by this one": [
        "Before November 2026, of nominally .95: two models of 2 trainings .795, of 3 .865; a model with itself .26 "
        "and .77; R² of probes over 2, 3, 5 and 10 models .77, .83, .85 and .93; ranks of 4 tasks × 2 seeds .74–.84; "
        "perplexity of 8 texts .84–.89; shares of the split of 10 sequences .78–.85; the share of position .13 (20 "
        "sequences) and .36 (80), from a bias of 1/n; the nearest of four equal heads .41; correlations of 8 heads "
        ".89–.91; the slope of λ with points at s = 1 .76–.89.",
    ],
}


def rows_of(name):
    return pd.read_parquet(FOLDER / f"{name}.parquet")


def share(row):
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def made(how):
    rows = rows_of("verdicts")
    return rows[rows["made"] == how]


def verdict_table(rows):
    scores = verdict_scores(rows).query("about == ''").set_index(["verdict", "metric"])
    for verdict in VERDICTS:
        if verdict not in scores.index.get_level_values(0):
            continue  # nothing is known of it in models that were trained
        cells = [
            share(scores.loc[(verdict, metric)]) if (verdict, metric) in scores.index else "" for metric in
            ("precision", "recall", "accuracy")
        ]  # fmt: skip
        yield f"| `{verdict}` | {' | '.join(cells)} | {scores.loc[(verdict, 'accuracy'), 'n']} |"


def confusion_table(rows):
    for verdict, of in VERDICTS.items():
        if of.positive is not None:
            table = confusion(rows, verdict)
            for truth, counts in table.iterrows():
                negative = NEGATIVE.get(verdict, f"not {of.positive}")
                cells = [str(counts.get(said, 0)) for said in (of.positive, negative)]
                yield f"| `{verdict}` | {truth} | {' | '.join(cells)} |"


def written():
    yield from verdict_table(made("written"))
    yield from confusion_table(made("written"))


def trained():
    yield from verdict_table(made("trained"))
    yield from confusion_table(made("trained"))


def interval_table():
    rows = rows_of("intervals")
    for row in rows.to_dict("records"):
        size = ", ".join(f"{row[c]} {c[2:]}" for c in rows if c.startswith("n_") and not pd.isna(row[c]))
        yield f"| {row['metric']} | {row['over']} | {size} | {share(row)} | {row['n']} |"


def verdict_text():
    rows = made("written")
    yield f"`constructions.known` has {rows['generator'].nunique()} kinds of models"
    yield f"stands in one of {WORDS[rows['variant'].nunique()]} variants in turn"
    seeds = {half: sorted(of["seed"].unique()) for half, of in rows.groupby("half")}
    yield f"with seeds {seeds['thresholds'][0]}–{seeds['thresholds'][-1]} in view"
    scored = rows[rows["half"] == "scored"]
    n_models = len(scored.drop_duplicates(["generator", "seed"]))
    yield f"have seeds {seeds['scored'][0]}–{seeds['scored'][-1]}: {n_models} models"
    yield f"Brackets are {100 * CONFIDENCE:.0f} % Wilson intervals"
    yield f"(those that are as near to {f'{TIE:.0e}'.replace('1e-04', '10⁻⁴')} nats count alike)"
    yield f"within rows, right within {short(SHARE)}."


def wrong(how, verdict, truth=None):
    """How many times each kind of model is told wrongly."""
    rows = made(how)
    rows = rows[(rows["half"] == "scored") & (rows["verdict"] == verdict) & ~rows["right"].astype(bool)]
    return (rows if truth is None else rows[rows["truth"] == truth])["generator"].value_counts()


def misses():
    """Which kinds of models are told wrongly, and how often: written ones, then trained ones."""
    for verdict in ("erasure_used", "patching_used"):
        assert wrong("written", verdict, "used").to_dict() == {"variance_decay_used": 6}
    yield f"before any layer has read it: all {WORDS[6]} misses of each"
    (sinks,) = wrong("written", "erasure_used", "not used").items()
    assert sinks[0] == "sink_content"
    yield f"Erasing called {WORDS[sinks[1]]} sinks of content a used"
    assert wrong("written", "patching_used", "not used").to_dict() == {"bos_counter_massive_bos_available": 1}
    assert [*wrong("written", "mechanism_there")] == [12] and wrong("written", "mechanism_used").empty
    assert wrong("written", "mechanism_there").index[0] == "variance_decay_available"
    uses = wrong("written", "used_for")
    assert uses.drop("head_duplicate").to_dict() == {"place_fixed_used": 6, "place_mirrored_used": 6}
    yield f"in {WORDS[uses['head_duplicate']]} of {WORDS[6]} models it does not see"
    rows = made("written").query("half == 'scored' and verdict == 'used_for' and truth != 'nothing'")
    yield f"These account for all {uses.sum()} errors."
    yield f"Among heads that are used for something, {short(rows['right'].mean(), 3)} are right."
    estimated = {v: wrong("trained", v, "used").to_dict() for v in ("mechanism_used", "patching_used", "erasure_used")}
    assert {name for of in estimated.values() for name in of} == {"trained_statistics_used"}
    none, patched, erased = (6 - of["trained_statistics_used"] for of in estimated.values())
    there = 6 - wrong("trained", "mechanism_there", "there")["trained_statistics_used"]
    assert none == 0 and there == 5
    yield f"in none of the {WORDS[6]} models that it is used (in {WORDS[there]}, that it is there)"
    yield f"patching finds it in {WORDS[patched]} and erasing in {WORDS[erased]}"
    assert wrong("trained", "erasure_used", "not used").to_dict() == {"trained_counter_unread": 1}
    assert wrong("trained", "patching_used", "not used").to_dict() == {"trained_sinusoids_unread": 1}
    assert wrong("trained", "mechanism_used", "not used").empty


def trained_text():
    rows = made("trained")
    yield f"`constructions.known.TRAINED` has {rows['generator'].nunique()} kinds of models"
    config = TRAINED["trained_counter_used"].config(Plan.draw(Draw("any", 0)), "layernorm")
    yield f"({config.n_layers} layers, d_model {config.d_model}, {config.n_heads} heads, LayerNorm"
    yield f"when {100 * ENFORCED:.0f} % of the answers of each kind are right"
    yield f"(there {100 * ESTIMATED:.0f} % of the answers)"
    scored = rows[rows["half"] == "scored"].drop_duplicates(["generator", "seed"])
    seeds = sorted(scored["seed"].unique())
    yield f"has seeds {seeds[0]}–{seeds[-1]} of each: {len(scored)} models"


def interval_text():
    rows = rows_of("intervals")
    yield f"Of nominally {short(CONFIDENCE)}. Each row draws"
    yield f"more often than {short(CONFIDENCE)} is conservative: with 2 trainings, intervals are so wide"
    over_trainings = rows[rows["n_trainings"] == 2].query("over == 'both'")
    assert over_trainings["value"].min() >= CONFIDENCE
    five, ten = (rows[(rows["n_sequences"] == n) & rows["n_trainings"].isna()] for n in (5, 10))
    assert five["high"].max() < CONFIDENCE
    skewed = ten[ten["metric"].isin(["mean change of a loss", "r2", "entropy", "minimum of 4 heads"])]["value"]
    ranks = rows[(rows["n_tasks"] == 4) & (rows["metric"] == "mean_reciprocal_rank")]["value"].item()
    around = f"{short(skewed.min())}–{short(skewed.max())}"
    yield f"still too narrow: 5 sequences; 10 sequences of something skewed ({around}: a loss"
    yield f"a mean rank over 4 tasks, which is one of few numbers ({short(ranks)})"
    least = rows["n"].min()
    half = ((rows["high"] - rows["low"]) / 2)[rows["n"] == least]
    yield (
        f"Where a row has {least} data sets, its coverage is known to ±{short(half.mean())} on average, ±"
        f"{short(half.max())} at worst"
    )


SECTIONS = (written, trained, interval_table, verdict_text, trained_text, misses, interval_text)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_the_page_says_what_its_rows_say(section):
    snippets = [*section()]
    assert len(snippets) > 3
    Page("verdicts.md").says(*snippets)


def test_no_number_is_from_elsewhere():
    page = Page("verdicts.md")
    for section in SECTIONS:
        page.says(*section())
    assert page.rest(NOT_MEASURED) == []


@pytest.mark.parametrize("name", ["verdicts", "intervals"])
def test_rows_say_with_what_they_were_made(name):
    assert "torch" in rows_of(name).attrs
