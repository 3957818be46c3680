"""Every number on docs/learnability.md comes from its rows, or is said here to be a setting or a definition."""

import pandas as pd
import pytest
from page_numbers import ROOT, Page, percent, power, short

from constructions.learnability import D_VOCAB, RESULTS, STEPS, LearningConfig

LENGTH = LearningConfig().length
STARTS = {
    "closed form": "closed_form",
    "× (1 + 5 % noise)": "closed_form_times_noise",
    "+ .01 noise on every weight": "closed_form_plus_noise",
    "Theorem 1 as written": "absolute_position",
    "Theorem 1 × (1 + 5 % noise)": "absolute_position_times_noise",
    "random, same shape": "random_alike",
}

NOT_MEASURED = {
    "the recipe": [
        "AdamW, rate 3e-3, no decay, 1,000 steps of 32 sequences",
        "measured on 256 new sequences",
        *("One length (64)", "1–2 seeds, 1,000 steps", "not 100 % after 1,000 steps", "about 20 minutes"),
        *("one layer of 17 rows", "d_model 64, 4 heads"),
    ],
    "definitions of the position, of mass and of the construction's weights": [
        *("t = 1 at the first", "mass is 1/t", "turns 1/t into t", "with 1/t is", "1/t, ln t", "1/t is in"),
        *("mass 1/(1 + (t − 1)e^(−c))", "ln(t − 1)", "c = 0", "W_K = 0", "spread 0", "is ≤ 0"),
    ],
    "names of layers, runs and theorems": [
        *("in layer 0", "of layer 0", "from layer 0", "layer 0's attention"),
        "Theorem 1's",
    ],
    "papers": ["Chi et al. 2023"],
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return pd.read_csv(RESULTS / "learnability.csv", keep_default_na=False, na_values=[""])


def of(rows, metric, stage="trained", **keys):
    """The rows of a metric; a ``layer`` of None is one without."""
    found = rows[(rows["metric"] == metric) & (rows["stage"] == stage)]
    for name, value in keys.items():
        found = found[found[name].isna() if value is None else found[name] == value]
    return found


def random(rows):
    return rows[rows["start"] == "random"]


def settings(rows):
    config = LearningConfig()
    yield f"say where each of {config.length} tokens stands"
    yield f"Content is random, {D_VOCAB - 1} ids"
    yield f"Always saying T/2 would give {LENGTH // 4};"
    untrained = of(random(rows), "mean_absolute_error", "initial", target="classification")["value"]
    yield f"untrained classifiers give {untrained.min():.0f}–{untrained.max():.0f}."
    assert STEPS == 1000


def table(rows):
    def cell(metric, digits, **keys):
        mean = of(random(rows), metric, **keys).groupby("normalization")["value"].mean()
        return " / ".join(f"{mean[n]:.{digits}f}" for n in ("none", "layer"))

    for layers in (1, 2, 3):
        for target, masked_digits in (("classification", 1), ("regression", 0)):
            keys = {"layers": layers, "target": target}
            name = f"{layers} layer{'s' * (layers > 1)}, {target}"
            cells = [
                cell("mean_absolute_error", 2, bos=True, **keys),
                cell("mean_absolute_error", 1, bos=False, **keys),
                cell("mean_absolute_error_masked", masked_digits, bos=True, layer=0, **keys),
            ]
            yield f"| {name} | {' | '.join(cells)} |"


def learned(rows):
    with_bos = random(rows)[random(rows)["bos"]]
    error = of(with_bos, "mean_absolute_error").set_index("run")
    right = of(with_bos, "accuracy")["value"]
    assert error["value"].max() < 0.4
    yield f"off by less than {error['value'].max():.1f} positions on average"
    yield f"({100 * right.min():.0f}–{percent(right.max())} of the tokens exactly right"
    masked = of(with_bos, "mean_absolute_error_masked", layer=0)
    by_target = masked.groupby("target")["value"].agg(["min", "max"]).round()
    classes, numbers = by_target.loc["classification"], by_target.loc["regression"]
    assert classes["min"] >= 30 and classes["max"] <= 31
    yield f"classifiers are off by {classes['min']:.0f}, regressions by {numbers['min']:.0f}–{numbers['max']:.0f}"


def family(rows):
    with_bos = random(rows)[random(rows)["bos"]]
    slope = of(with_bos, "slope")["value"]
    yield (
        f"have slope {short(slope.max())} … {short(slope.min())} in all {len(slope)} trained heads (median "
        f"{short(slope.median())})"
    )
    c, before = of(with_bos, "c"), of(with_bos, "c", "initial")["value"]
    median = c.groupby("target")["value"].median()
    yield (
        f"c = {median['classification']:.1f} for classifiers and {median['regression']:.1f} for regressions (range "
        f"{tenth(c['value'].min())} … {tenth(c['value'].max())}), from {tenth(before.median())} "
        f"({tenth(before.min())} … {tenth(before.max())}) at initialisation"
    )
    in_run = ", ".join(f"{x:.1f}" for x in c[c["run"] == 2]["value"])
    yield f"({in_run} in run 2)"
    after_attention = {"site": "hook_resid_mid", "layer": 0}
    log, start = (of(with_bos, "r2_log", s, **after_attention)["value"] for s in ("trained", "initial"))
    by_hand = of(rows, "r2_log", "initial", start="closed_form", **after_attention)["value"].iloc[0]
    yield (
        f"with R² {short(log.min())}–{short(log.max(), 3)} ({short(start.min())}–{short(start.max())} at "
        f"initialisation), where the construction, with its single 1/t, has {short(by_hand)}."
    )


def tenth(value):
    return f"{value:.1f}".replace("-", "−")


def content(rows):
    with_bos, without = (random(rows)[random(rows)["bos"] == bos] for bos in (True, False))
    spread, before = of(with_bos, "spread"), of(with_bos, "spread", "initial")["value"]
    classes, numbers = (spread[spread["target"] == t]["value"] for t in ("classification", "regression"))
    assert numbers.median() > before.median()
    yield (
        f"by {short(classes.median())} nats in classifiers (median; {short(before.median())} at initialisation; the "
        f"cleanest head {short(spread['value'].min())}), and by {numbers.median():.1f} in regressions"
    )
    evenness = [of(with_bos, "evenness", stage)["value"].median() for stage in ("trained", "initial")]
    yield f"(normalised entropy {short(evenness[0])}, from {short(evenness[1])})"
    slope, of_first = of(with_bos, "slope", "initial")["value"], of(without, "slope")["value"]
    yield f"it is {short(slope.max())} … {short(slope.min())} at initialisation"
    other = of(without, "spread")["value"]
    yield (
        f"is {short(of_first.max())} … {short(of_first.min())} after training, with a spread of {other.min():.0f}–"
        f"{other.max():.0f} nats"
    )
    first, last = (of(with_bos, "correlation", s).set_index(["run", "head"])["value"] for s in ("initial", "trained"))
    assert 0.4 < (last < first).mean() < 0.6  # about half
    yield (
        f"worse still: {short(first.min())}–{short(first.max())} before training, and it falls in about half of the "
        f"heads (to {short(last.min())} in the lowest)"
    )


def sites(rows):
    two = random(rows)[random(rows)["bos"] & (random(rows)["layers"] == 2)]

    def change(metric, site, layer, digits=2):
        before, after = (of(two, metric, s, site=site, layer=layer)["value"].mean() for s in ("initial", "trained"))
        return f"{short(before)} → {short(after, digits)}"

    middle, end = "hook_resid_mid", "hook_resid_post"
    yield (
        f"after attention 0, 1/t {change('r2_reciprocal', middle, 0)}, ln t {change('r2_log', middle, 0)}, t "
        f"{change('r2_position', middle, 0)}; after MLP 0, t {change('r2_position', end, 0)}; after MLP 1, t "
        f"{change('r2_position', end, 1, 3)}. The embedding has "
        f"{short(of(two, 'r2_position', site='hook_embed', layer=None)['value'].mean(), 3)}"
    )


def leaks(rows):
    without = random(rows)[~random(rows)["bos"]]
    error = of(without, "mean_absolute_error").set_index("run")
    r2 = {n: of(without, "r2_position", site="hook_resid_post", layer=n - 1, layers=n)["value"] for n in (1, 2)}
    two, one = (error[error["layers"] == n] for n in (2, 1))
    regression, classes = (one[one["target"] == t]["value"] for t in ("regression", "classification"))
    yield (
        f"t has R² {short(r2[2].min())}–{short(r2[2].max())} at the end of two layers and an error of "
        f"{two['value'].min():.1f}–{two['value'].max():.1f} positions; of one layer {short(r2[1].min())}–"
        f"{short(r2[1].max())} and {one['value'].min():.0f}–{one['value'].max():.0f} ({regression.min():.1f} for "
        f"regressions, {classes.min():.0f} and more for classifiers"
    )
    masked = of(random(rows), "mean_absolute_error_masked", layer=0).set_index("run")
    times = masked["value"] / of(random(rows), "mean_absolute_error").set_index("run")["value"]
    assert (times[one.index] < 1).all()
    yield f"error at most {times[~masked['bos']].max():.1f} times (with one layer it falls slightly)"
    assert times[masked["bos"]].min() > 100
    yield "with `<bos>` at least 100 times."


def size(value):
    """Two digits of an error: 0, 1.2e-4, 0.022, 2.9, 18."""
    if value == 0:
        return "0"
    return power(value, 1) if value < 1e-3 else f"{value:.2g}"


def loss(value):
    """Two or three digits of a loss: 4.7e-15, .906, 1.55, 110."""
    if value < 0.1:
        return power(value, 1)
    return short(value, 3 if value < 1 else 2 if value < 10 else 0)


def from_the_construction(rows):
    for name, start in STARTS.items():
        for target in ("classification", "regression"):
            keys = {"start": start, "target": target}
            if of(rows, "loss", **keys).empty:
                continue
            errors, losses = (
                [of(rows, metric, stage, **keys)["value"].item() for stage in ("initial", "trained")]
                for metric in ("mean_absolute_error", "loss")
            )
            weights = [
                of(rows, "change_from_construction", stage, site=None, **keys)["value"]
                for stage in ("initial", "trained")
            ]
            change = " → ".join(f"{100 * each.item():.0f}" for each in weights if len(each))
            cells = [" → ".join(map(size, errors)), " → ".join(map(loss, losses)), f"{change} %" if change else ""]
            yield f"| {name} | {target} | {' | '.join(cells)} |".replace("|  |", "| |")


def what_happens_to_it(rows):
    closed = {t: [of(rows, "loss", s, start="closed_form", target=t)["value"].item() for s in ("initial", "trained")]
              for t in ("classification", "regression")}  # fmt: skip
    right = of(rows, "accuracy", start="closed_form")["value"]
    assert right.min() >= 0.99
    yield "(rounded, at least 99 % right from the unperturbed closed form)"
    yield f"a little ({' → '.join(map(loss, closed['classification']))})"
    yield f"starts at loss {loss(closed['regression'][0])} ends at {loss(closed['regression'][1])}"
    slower = pd.read_csv(ROOT / "docs" / "learnability" / "slower.csv", keep_default_na=False, na_values=[""])
    number, classes = (
        (
            of(slower, "loss", target=t)["value"].item(),
            of(slower, "change_from_start", target=t, site=None)["value"].item(),
        )
        for t in ("regression", "classification")
    )
    yield (
        f"({loss(number[0])}, change {percent(number[1], 1)}; the classifier: {loss(classes[0])}, change "
        f"{percent(classes[1])}"
    )
    noisy = {"start": "closed_form_plus_noise"}
    c, spread = (of(rows, metric, **noisy)["value"] for metric in ("c", "spread"))
    yield f"for {short(c.min())}–{short(c.max())}, the direction"
    yield f"grows to {short(spread.min())}–{short(spread.max())}"
    others = rows[~rows["start"].isin(["random", "random_alike", "closed_form_plus_noise"])]
    assert (of(others, "c")["value"] == 0).all() and (of(others, "spread")["value"] == 0).all()


SECTIONS = (settings, table, learned, family, content, sites, leaks, from_the_construction, what_happens_to_it)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_the_page_says_what_its_rows_say(section, rows):
    Page("learnability.md").says(*section(rows))


def test_no_number_is_from_elsewhere(rows):
    page = Page("learnability.md")
    for section in SECTIONS:
        page.says(*section(rows))
    assert page.rest(NOT_MEASURED) == []
