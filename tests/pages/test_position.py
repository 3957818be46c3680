"""Every number on docs/position.md comes from its rows, or is said here to be a setting, name or earlier number."""

import importlib.util
import json
import re

import pandas as pd
import pytest
from page_numbers import ROOT, WORDS, Page, between, short, with_interval
from small_study import untrained_study

from probe.position import patched_position_used, position_used
from probe.position.edits.readable import READABLE
from probe.statistics import student
from probe.study.config import PRESETS

ENCODINGS = ("none", "t5", "alibi", "rotary", "sinusoidal")
LAST, BEFORE_1 = "blocks.2.hook_resid_post", "blocks.1.hook_resid_pre"

NOT_MEASURED = {
    "dates, positions and layers": [
        *("November 2026", "Erasing and patching leave position 0 out", "in heads of layer 0", "Before layer 0"),
        *("behind layer 2", "| before layer 1 |", "before layer 1, and leave alone what", "notebook 02"),
    ],
    "numbers of the earlier page": ["lost .42 nats then", "cost it 2.38 and"],
    "what steering is asked for, and gives where attention follows": ["by −4 … 0 tokens", "would move by 1:"],
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return pd.read_parquet(ROOT / "docs" / "seeds" / "rows.parquet")


@pytest.fixture(scope="module")
def edits():
    return pd.read_parquet(ROOT / "docs" / "position" / "edits.parquet")


def of(rows, **keys):
    for key, value in keys.items():
        rows = rows[rows[key] == value]
    return rows


def line(name, cells):
    return f"| {name} | {' | '.join(cells)} |"


def probes(rows, edits):
    fit = of(rows, measurement="fit", target="position")
    study = PRESETS["default"]
    yield f"{study.trace_sequences} sequences of {study.trace_length} tokens split by sequence, three trainings"
    yield f"small models, {study.trace_sequences} short sequences"
    yield f"SCAN to {study.task_options['train_length']} actions"
    read = of(fit, site=LAST, metric="r2", control="none").set_index("encoding")
    less = of(fit, site=LAST, metric="selectivity", control="untrained").set_index("encoding")
    assert set(read["interval"]) == set(less["interval"]) == {"both"} and set(read["n_models"]) == {3}
    yield line("R²", [with_interval(read.loc[e], 3) for e in ENCODINGS])
    yield line("less the untrained model's", [with_interval(less.loc[e], 3) for e in ENCODINGS])
    assert (less["value"] < 0).all() and less.loc["sinusoidal", "high"] < -0.005
    embedding = of(fit, site="hook_embed", metric="r2", control="none")["value"]
    assert embedding.max() - embedding.min() < 1e-6
    yield f"The token embedding alone has {short(embedding.mean(), 3)}."


def changes(rows, edits):
    """What training changes in NoPE, by site."""
    fit = of(rows, measurement="fit", target="position", metric="selectivity", control="untrained", encoding="none")
    fit = fit.set_index("site")
    stream = fit[fit.index.str.endswith("resid_post")]
    assert len(stream) == 3 and ((stream["low"] < 0) & (stream["high"] > 0)).all()
    out = fit.loc["blocks.2.hook_attn_out"]
    fall = f"{short(-out['value'])} {between(-out['high'], -out['low'])}"
    yield f"layer 2's attention adds: its R² in NoPE falls by {fall}."
    heads = fit[fit.index.str.contains("hook_z")]
    fallen = heads[heads["high"] < 0].groupby(lambda site: int(site.split(".")[1])).size()
    assert len(heads) == 12 and not (heads["low"] > 0).any() and set(fallen.index) == {1, 2}
    yield f"a fall is established in {WORDS[fallen[2]]} of layer 2 and {WORDS[fallen[1]]} of layer 1, a rise in none."


def extrapolation(rows, edits):
    found = of(rows, measurement="extrapolation", metric="mean_absolute_error")
    fitted, beyond = (of(found, scope=scope).set_index(["encoding", "control"]) for scope in ("fitted", "beyond"))
    (n,), (end,) = fitted["position_end"].unique(), beyond["position_end"].unique()
    near = fitted.loc[("none", "none"), "value"]
    yield (
        f"the first {n:.0f} tokens are off by {near:.1f} tokens there and "
        f"by {with_interval(beyond.loc[('none', 'none')], 1)} beyond, to position {end - 1:.0f}, in NoPE (untrained: "
        f"{with_interval(beyond.loc[('none', 'untrained')], 1)})"
    )
    bins = of(found, scope="bin", control="none", encoding="none").query("position >= @n")
    says_last = ((bins["position"] + bins["position_end"] - 1) / 2 - (n - 1)).astype(float)
    stuck = (says_last * bins["n"]).sum() / bins["n"].sum()
    yield f"would be off by about {short(stuck, 1)}. No encoding"
    trained = beyond.xs("none", level="control")
    assert (trained["high"] > stuck).all()
    yield f"sinusoidal included ({with_interval(trained.loc['sinusoidal'], 1)})"


def losses(edits, measurement="erase", **keys):
    """By encoding, training and control."""
    found = of(edits, measurement=measurement, metric="loss", **keys)
    return found.set_index(["encoding", "seed", "control"]).sort_index()


def over_trainings(values, digits=2):
    found = student(list(values), 0.95)
    return with_interval({"value": found.value, "low": found.low, "high": found.high}, digits)


def erased(rows, edits):
    own = losses(edits, site=BEFORE_1, concept="position")
    first = of(rows, measurement="use", metric="loss", site=BEFORE_1, control="none").set_index(["encoding", "concept"])
    yield f"loses {short(first.loc[('none', 'position'), 'value'])} now"
    yield f"and costs {short(first.loc[('none', 'classes'), 'value'])} (first training)"
    yield f"The picture has the first training with intervals over {first['n'].iloc[0]:.0f} sequences"
    for name in ("position", "classes"):
        found = losses(edits, site=BEFORE_1, concept=name)
        cost = {e: found.loc[e].xs("none", level="control")["value"] for e in ENCODINGS}
        less = {e: cost[e] - found.loc[e].xs("random", level="control")["value"] for e in ENCODINGS}
        rank = f"{found['rank'].max():.0f}"
        names = {
            "position": ("one direction, position as a number", "less a random direction"),
            "classes": (f"all that tells positions apart (rank {rank})", f"less random, rank {rank} of 128"),
        }[name]
        yield line(names[0], [over_trainings(cost[e]) for e in ENCODINGS])
        # In print where it is established over sequences, too.
        yield line(names[1], [over_trainings(less[e]) for e in ENCODINGS])
        assert {e for e in ENCODINGS if student(list(less[e]), 0.95).low > 0} == {"alibi", "sinusoidal"}
        if name == "position":
            yield line("each training", [", ".join(short(x) for x in cost[e]) for e in ENCODINGS])
    own = own.xs("none", level="control")
    above = (own["low"] > 0).groupby("encoding").sum()
    assert above.to_dict() == {"none": 3, "t5": 2, "alibi": 0, "rotary": 1, "sinusoidal": 3}
    all_of_it = losses(edits, site=BEFORE_1, concept="classes").xs("none", level="control").loc["alibi"]
    assert (all_of_it["low"] > 0).all() and (all_of_it["p"] < 0.051).all()
    assert (own["p"] < 0.051).groupby("encoding").sum()["none"] == 3
    yield f"along any of {round(1 / own['p'].min()) - 1} random directions"
    yield f"and does in the third ({with_interval(own.loc[('rotary', 2)])} over sequences)"
    assert (own.loc["rotary"]["p"] < 0.051).tolist() == [False, False, True]


def verdicts(rows, edits):
    found = position_used(of(edits, measurement="erase"))
    assert len(found) == 15 * 3 * 2 and set(found["verdict"]) == {"not used"}
    before = found[found["site"] == BEFORE_1]["probe_r2_before"]
    assert found["probe_r2_before"].max() < READABLE
    yield (
        f"before layer 1 a probe reads R² {short(before.min())} to {short(before.max())}, and `position_used` asks for "
        f"{short(READABLE, 1)}."
    )
    nothing = of(edits, measurement="erase", site="blocks.0.hook_resid_pre", metric="loss", control="none")
    assert (nothing[nothing["encoding"] != "sinusoidal"]["value"] == 0).all()


def exchanged(rows, edits):
    found = of(edits, measurement="patch", control="none").set_index(["encoding", "seed"])
    beyond, alone = (of(found, metric=f"loss_{name}_exchange") for name in ("beyond", "of"))
    none, t5, alibi, rotary, sinusoidal = (over_trainings(beyond.loc[e, "value"]) for e in ENCODINGS)
    yield f"Give every token the position part (rank {beyond['rank'].max():.0f}) of another"
    yield f"by {none} in NoPE; T5 {t5}, ALiBi {alibi}, rotary {rotary}, sinusoidal {sinusoidal} (intervals over three"
    assert all(student(list(beyond.loc[e, "value"]), 0.95).low > 0 for e in ENCODINGS)
    assert (beyond["low"] > 0).all() and (beyond["p"] < 0.051).all() and set(beyond["shift"]) == {4}
    n_random = round(1 / beyond["p"].max()) - 1
    yield f"lies above 0, and the loss is more than all {n_random} random subspaces of that rank"
    yield f"The exchange alone costs {short(alone['value'].min())} to {short(alone['value'].max())}, and never as"
    assert (alone["value"] < beyond["value"]).all()
    found = of(edits, measurement="patch").drop(columns=["concept_name", "head", "query", "length"], errors="ignore")
    verdicts = patched_position_used(found)
    assert len(verdicts) == 15 and set(verdicts["verdict"]) == {"used"}
    yield f"a probe reads R² {short(verdicts['probe_r2_before'].min())} to 1.00"
    assert verdicts["probe_r2_before"].max() > 0.995
    shifted = of(edits, measurement="patch", metric="decoded_shift", layer=2, shift=4, control="none")["value"]
    assert len(shifted) == 15
    yield f"the probe reads {short(shifted.min(), 1)} to {short(shifted.max(), 1)} tokens more.)"


def steered(rows, edits):
    found = of(edits, measurement="steer", metric="attention_moved", control="none")
    assert len(found) == 15 * 8
    yield f"the mean attended position of no head behind it by more than {short(found['value'].abs().max())} of that"
    assert (found["value"] < 0).mean() > 0.5
    nope = of(found, encoding="none")
    yield (
        f"{(nope['high'] < 0).sum()} of NoPE's {len(nope)} heads (in layers 1 and 2 of three models) go backwards, "
        f"{(nope['low'] > 0).sum()} forward, by intervals over sequences."
    )


def notebook(rows, edits):
    """The stored output of the last table of notebook 02."""
    cells = json.loads((ROOT / "notebooks" / "02_reading_position.ipynb").read_text(encoding="utf-8"))["cells"]
    stored = "\n".join("".join(o.get("data", {}).get("text/plain", [])) for c in cells for o in c.get("outputs", []))
    part = stored[stored.index("head that moves most, tokens a token") :]
    copying, reversing = (float(re.search(rf"^{name} +(\S+)", part, re.M)[1]) for name in ("none", "none, backwards"))
    yield f"a head that moves by {short(copying)} when copying, and by {short(reversing)}, backwards, when reversing"


def script():
    spec = importlib.util.spec_from_file_location("edits", ROOT / "docs" / "position" / "edits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SECTIONS = (probes, changes, extrapolation, erased, verdicts, exchanged, steered, notebook)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_the_page_says_what_its_rows_say(section, rows, edits):
    Page("position.md").says(*section(rows, edits))


def test_no_number_is_from_elsewhere(rows, edits):
    page = Page("position.md")
    for section in SECTIONS:
        page.says(*section(rows, edits))
    assert page.rest(NOT_MEASURED) == []


def test_the_script_erases_as_the_study_does(rows, edits):
    """The first training of each encoding is in both: the same numbers."""
    keys = ["encoding", "site", "concept", "control", "metric"]
    mine = of(edits, measurement="erase", seed=0).set_index(keys)["value"]
    study = of(rows, measurement="use").query("metric != 'template_distance'").set_index(keys)["value"]
    pd.testing.assert_series_equal(mine.sort_index(), study.sort_index(), rtol=1e-6)
    assert edits.attrs["command"] == script().COMMAND


def test_the_script_makes_such_rows(edits, tmp_path):
    untrained_study(tmp_path, encodings=("none", "rotary"), seeds={"none": 2}, trace_length=12)
    rows = pd.concat(script().measure(tmp_path, n_random=2, n_bootstrap=20), ignore_index=True)
    assert set(rows.columns) == set(edits.columns) and set(rows["metric"]) == set(edits["metric"])
    found = rows.drop_duplicates(["encoding", "seed"])[["encoding", "seed"]].to_numpy().tolist()
    assert found == [["none", 0], ["none", 1], ["rotary", 0]]
