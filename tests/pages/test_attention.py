"""Every number on docs/attention.md comes from its rows, or is said here to be a setting, name or earlier number."""

import importlib.util

import pandas as pd
import pytest
from page_numbers import ROOT, Page, between, percent, power, short, with_interval
from small_study import untrained_study

from probe.attention import nearest_template
from probe.study.config import PRESETS

ENCODINGS = ("none", "t5", "alibi", "rotary", "sinusoidal")

NOT_MEASURED = {
    "dates, papers, theorems and an earlier page": [
        *("Kazemnejad et al. 2023, section 5.2", "November 2026", "Theorem 2's"),
        "(by .028 [.000, .051] then) and to sinusoidal models (.030 [.006, .050])",
    ],
    "settings, definitions and names of heads": [
        *("95 % intervals", "leaves 0 out", "5 back"),
    ],
    "what a slow test of the split asks for": ["32,768 tokens × 8 heads in less than 1.5 GB"],
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return pd.read_parquet(ROOT / "docs" / "seeds" / "rows.parquet")


def stage(rows, name, **keys):
    found = rows[rows["measurement"] == name]
    for key, value in keys.items():
        found = found[found[key] == value]
    return found


def settings(rows):
    study = PRESETS["default"]
    layers, width, heads = (study.model[name] for name in ("n_layers", "d_model", "n_heads"))
    yield f"({layers} layers, d_model {width}, {heads} heads) on SCAN"
    yield f"SCAN up to {study.task_options['train_length']} actions"
    yield f"{study.training.steps:,} steps"
    right = stage(rows, "accuracy", split="validation", metric="exact_match").query("length.isna()")
    assert len(right) == 15 and set(right["encoding"]) == set(ENCODINGS)
    yield f"exact match in distribution {short(right['value'].min(), 3)}–{short(right['value'].max(), 3)}"
    yield f"Attention on {study.trace_sequences} held-out sequences of {study.trace_length} tokens"
    assert rows.attrs["command"] in Page("attention.md").raw


def distances(rows, control="none", aggregate="minimum"):
    """Of NoPE from each model, itself among them."""
    found = stage(rows, "model_distance", scope="mean", control=control, aggregate=aggregate, model_a="none")
    return found.set_index("model_b")


def matrix(rows):
    of = distances(rows)
    assert (of["interval"] == "both").all()
    _, t5, alibi, rotary, sinusoidal = (short(of.loc[name, "value"], 3) for name in ENCODINGS)
    yield f"From NoPE it is {t5} to T5, {alibi} to ALiBi, {rotary} to rotary, {sinusoidal} to sinusoidal."
    yield f"(to T5 {t5} before and now)"  # an earlier number too, the same
    t5 = stage(rows, "model_distance", scope="mean", control="none", aggregate="minimum", model_a="t5", model_b="t5")
    yield f"Two seeds of NoPE are {with_interval(of.loc['none'], 3)} apart, two of T5 {with_interval(t5.iloc[0], 3)}"
    of = distances(rows, aggregate="matching")["value"]
    none, t5, alibi, rotary, sinusoidal = (short(of[name], 3) for name in ENCODINGS)
    yield f"{none} to itself, {t5} T5, {alibi} ALiBi, {sinusoidal} sinusoidal, {rotary} rotary."


def order(rows):
    found = stage(rows, "model_order", control="none", aggregate="minimum")
    of = found[(found["reference"] == "none") & (found["model_a"] == "t5")].set_index("model_b")
    nearer = {name: f"{short(-r['value'], 3)} {between(-r['high'], -r['low'], 3)}" for name, r in of.iterrows()}
    yield (
        f"T5 is nearer to NoPE than ALiBi by {nearer['alibi']}, than rotary by {nearer['rotary']}, than sinusoidal by "
        f"{nearer['sinusoidal']} (paired; three seeds)"
    )
    assert (found[found["reference"] == "none"]["high"] > 0).all()  # no order of the models is established
    before = distances(rows, "untrained")["value"]
    t5, alibi, rotary, sinusoidal = (short(before[name], 3) for name in ENCODINGS[1:])
    yield f"sinusoidal ({sinusoidal}) is nearest, and T5 ({t5}), ALiBi ({alibi}) and rotary ({rotary}) follow."
    clear = found[(found["high"] < 0) | (found["low"] > 0)]
    assert len(clear) == 1 and 1 < 0.05 * len(found) < 2
    (r,) = clear.to_dict("records")
    assert (r["reference"], r["model_a"], r["model_b"]) == ("alibi", "none", "rotary")
    yield f"Of the {len(found)} differences that the five trained models allow"
    nearer = f"{short(-r['value'], 3)} {between(-r['high'], -r['low'], 3)}"
    yield f"NoPE is nearer than rotary by {nearer}. Among {len(found)}, one or two would"


NULLS = ("explained", "null_uniform", "null_shuffled", "null_seed")


def nearest(rows, control="none"):
    """The best template of every head."""
    found = stage(rows, "templates", control=control)
    columns = ["encoding", "layer", "head", "template", "n_parameters", "metric", "value", *NULLS]
    return nearest_template(found[columns])


def templates(rows):
    best = nearest(rows)
    means = best.groupby("encoding")[["value", *NULLS]].mean().loc[list(ENCODINGS)]
    most = f"{best['n_parameters'].max():.0f}"
    for name, column in {
        f"distance from the best template (up to {most} parameters)": "value",
        "from uniform attention": "null_uniform",
        "with the keys shuffled, from a template fitted anew": "null_shuffled",
        "from the nearest head of another seed": "null_seed",
    }.items():
        yield f"| {name} | {' | '.join(short(x, 3) for x in means[column])} |"
    yield f"| share explained | {' | '.join(percent(x) for x in means['explained'])} |"
    assert ((means["null_seed"] < means["value"]).drop("rotary")).all()
    nearer, before = ((of["null_seed"] < of["value"]).sum() for of in (best, nearest(rows, "untrained")))
    yield f"is the nearer one for {nearer} of {len(best)} heads"
    assert before == 0


def split(rows):
    seen = stage(rows, "split", scope="seen")

    def mean(encoding, metric, control="none", of=seen, **keys):
        found = of[(of["encoding"] == encoding) & (of["metric"] == metric) & (of["control"] == control)]
        for key, value in keys.items():
            found = found[found[key] == value]
        assert len(found) == 12  # heads
        return short(found["value"].mean(), 3)

    yield (
        f"f_rel alone has R² {mean('none', 'toeplitz_r2')} of the scores' variance within rows in NoPE "
        f"({mean('none', 'toeplitz_r2', 'untrained')} before training), {mean('alibi', 'toeplitz_r2')} in ALiBi "
        f"({mean('alibi', 'toeplitz_r2', 'untrained')}), whose"
    )
    shares = [mean("none", "share", part=part) for part in ("distance", "key", "residual")]
    yield "f_rel has {}, f_abs {} and content {}.".format(*shares)
    of_means = stage(rows, "split", scope="mean")
    trained, untrained = (mean("none", "toeplitz_r2", c, of_means) for c in ("none", "untrained"))
    yield f"f_rel has {trained} of NoPE's mean scores ({untrained})"
    trained, untrained = (mean("none", "t5_r2", c) for c in ("none", "untrained"))
    yield f"(R² {trained}), but over 20 tokens they fit nearly any curve: {untrained} before training"


def census(rows):
    trained = stage(rows, "census", control="none")
    heads = trained.drop_duplicates(["encoding", "layer", "head"])
    assert set(heads["label"]) == {"content"}
    yield f'labels all {len(heads)} heads "content"'
    nope = trained[trained["encoding"] == "none"]
    cost = {m: of["value"].max() for m, of in trained.groupby("metric")}
    of_nope = {m: of["value"].max() for m, of in nope.groupby("metric")}
    yield f"by its best template costs up to {short(of_nope['loss_without_content'])} nats a token"
    yield f"leaving the rest costs at most {short(of_nope['loss_without_position'], 3)}"
    uses = heads[heads["encoding"] == "none"]["used_for"].value_counts()
    assert uses.to_dict() == {"content": 11, "nothing": 1}
    yield f"{uses['content']} of NoPE's {uses.sum()} heads are used for content alone, {uses['nothing']} for nothing."
    others = heads[heads["encoding"] != "none"]
    used = others["used_for"].isin(["position", "both"])
    yield (
        f"{used.sum()} of {len(others)} heads are used for position, among them one or two by chance; to take it out "
        f"costs at most {short(cost['loss_without_position'])}."
    )


def relied_upon(rows):
    found = pd.read_parquet(ROOT / "docs" / "attention" / "slopes.parquet")
    assert found.attrs["command"] == "python docs/attention/slopes.py runs/seeds"
    off = (found["value"] - found["given"]).abs().groupby(found["metric"]).max()
    yield f"the slopes and the buckets of the first layer to {power(off[['slope', 'bucket']].max())}"
    assert set(found.loc[found["metric"] == "slope_of_long_context", "layer"]) == {0, 1, 2}
    yield f"At {script().LONG:,} random tokens it returns"
    yield f"slopes from every layer to {power(off['slope_of_long_context'])}."


def script():
    spec = importlib.util.spec_from_file_location("slopes", ROOT / "docs" / "attention" / "slopes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SECTIONS = (settings, matrix, order, templates, split, census, relied_upon)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_the_page_says_what_its_rows_say(section, rows):
    Page("attention.md").says(*section(rows))


def test_no_number_is_from_elsewhere(rows):
    page = Page("attention.md")
    for section in SECTIONS:
        page.says(*section(rows))
    assert page.rest(NOT_MEASURED) == []


def test_the_script_makes_such_rows(tmp_path):
    """And the biases of untrained models are found: here in sequences of 256 tokens, not of 4,096."""
    slopes = script()
    slopes.LONG = 256
    untrained_study(tmp_path, encodings=("t5", "alibi"), seeds={}, trace_sequences=60, trace_length=16)
    rows = pd.concat(slopes.measure(tmp_path), ignore_index=True)
    made = pd.read_parquet(ROOT / "docs" / "attention" / "slopes.parquet")
    assert set(rows.columns) == set(made.columns) and set(rows["metric"]) == set(made["metric"])
    assert (rows["value"] - rows["given"])[rows["metric"] != "slope_of_long_context"].abs().max() < 1e-5
