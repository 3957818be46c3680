"""Every number on docs/released.md comes from rows or is computed here, or is said to be a setting or a name."""

import importlib.util
import math

import numpy as np
import pandas as pd
import pytest
import torch
from bridged import OPTIONS
from page_numbers import ROOT, WORDS, Page, between, percent, short, with_interval
from scipy.optimize import linprog

from probe.attention import by_layer_encoding
from probe.models.encodings import make_encoding
from probe.models.encodings.bias import alibi_slopes
from probe.models.open.kinds import KINDS, KINDS_OF
from probe.position import position_used
from probe.statistics import student

FOLDER = ROOT / "docs" / "released"
REFUSED = ("GPT-J", "GPT-Neo", "OPT", "XGLM", "CodeGen")

NOT_MEASURED = {
    "what the checkpoint is, and what is asked of it": [
        "GPT-2 that comes inside",
        "0.5.8, MIT; 8 layers × 8 heads, d_model 256, 8.9 million parameters, 512 positions",
        "64 sequences of 64 tokens",
        "After layer 0",
    ],
    "what the hybrids are and learn": [
        "four layers of four heads, d_model 96",
        "strings of up to 16 symbols",
        "| rotary in layers | layer 0 | 1 | 2 | 3 |",
        "with rotary positions in layers 1 and 3",
        "of rotary positions in layers 0 and 2",
    ],
    "Falcon-RW's size, and a length of the tests": ["32 heads and 2,048", "logits at 700 positions"],
    "versions, tolerances and papers": [
        *("TransformerLens 4.3, around transformers 5.24", "to 1e-5 of the largest", "Inkling 2", "Yang et al. 2025"),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def hybrids():
    return pd.read_parquet(FOLDER / "hybrids.parquet")


def trained(rows, metric):
    return rows[(rows["control"] == "none") & (rows["metric"] == metric)]


def hybrids_table(rows):
    of_layer = ["rotary_layers", "layer", "layer_encoding"]
    by_seed = trained(rows, "on_keys").groupby([*of_layer, "seed"])["value"].mean()
    layers = by_seed.groupby(of_layer).agg(["mean", "min", "max"]).reset_index()
    for key, of in layers.groupby("rotary_layers"):
        cells = []
        for row in of.sort_values("layer").itertuples():
            # The range stands where there is something to see: not where attention is near uniform attention's .05.
            around = f" {between(row.min, row.max)}" if row.mean > 0.1 else ""
            rotary = " (rotary)" if row.layer_encoding == "rotary" else ""
            cells.append(f"{short(row.mean)}{around}{rotary}")
        yield f"| {key.replace(', ', ' and ')} | {' | '.join(cells)} |"
    most = by_seed.reset_index().pipe(lambda r: r.loc[r.groupby(["rotary_layers", "seed"])["value"].idxmax()])
    held = int((most["layer_encoding"] == "rotary").sum())
    yield f"The layer that retrieves most is a rotary one in {WORDS[held]} runs of {WORDS[len(most)]}"


def hybrids_text(rows):
    right = rows.drop_duplicates(["rotary_layers", "seed"])["exact_match"]
    n_seeds = rows["seed"].nunique()
    yield f"(exact match {short(right.min())} to {short(right.max())}, {WORDS[n_seeds]} seeds each"
    uniform = rows[rows["metric"] == "on_keys_uniform"]["value"].mean()
    untrained = rows[(rows["control"] == "untrained") & (rows["metric"] == "on_keys")]
    assert short(untrained["value"].mean()) == short(uniform)
    yield f"uniform attention has {short(uniform)}, and so have untrained models"
    found = {
        key: by_layer_encoding(of).set_index("layer_encoding").loc["none - rotary"]
        for key, of in trained(rows, "on_keys").groupby(["rotary_layers", "seed"])
    }
    later = -np.array([row["value"] for (layers, _), row in found.items() if layers == "1, 3"])
    assert (later > 0).all()
    mean = student(later, 0.95)
    yield (
        f"less attention on the key in each of the {WORDS[n_seeds]} seeds, by {short(mean.value)} "
        f"{between(mean.low, mean.high)} (Student's t over seeds)"
    )
    earlier = {seed: row for (layers, seed), row in found.items() if layers == "0, 2"}
    odd = max(earlier.values(), key=lambda row: row["value"])
    below = sorted(row["value"] for row in earlier.values() if row["value"] < 0)
    assert odd["low"] < 0 < odd["high"]  # it does not tell which is the rule
    yield (
        f"{WORDS[len(below)]} seeds have the difference at {short(below[-1])} … {short(below[0])}, one at "
        f"+{short(odd['value'])}"
    )
    reach = trained(rows, "reach").groupby(["layer_encoding", "rotary_layers"])["value"].mean()
    yield (
        f"their reach is {' and '.join(short(x) for x in reach['rotary'])} times that of uniform attention, that of "
        f"the others {' and '.join(short(x) for x in reach['none'])}"
    )


def falcon_bias(n_heads, d_head, n):
    options = {"scale": d_head**-0.5, "rounded": "bfloat16"}
    encoding = make_encoding("alibi_keys", options, n_heads=n_heads, d_head=d_head, d_model=n_heads * d_head, n_ctx=n)
    return encoding.bias(torch.tensor([n - 1]), torch.arange(n), torch.empty((), dtype=torch.float64))[:, 0]


def exact_to(bias):
    off = (bias[:, 1:2] * torch.arange(bias.shape[1]) != bias).any(0)
    return int(off.nonzero()[0]) - 1


def falcon(rows):
    bias, i, one = falcon_bias(32, 64, 2048), np.arange(2048.0), np.ones(2048)
    bounds = np.concatenate([np.c_[-i, -one, -one], np.c_[i, one, -one]])  # |bias_i - a i - c| <= e, the least e
    free = [(None, None)] * 2 + [(0, None)]
    away = [linprog([0, 0, 1], bounds, np.r_[-b, b], bounds=free).fun for b in bias.numpy()]
    alibi = -alibi_slopes(32)[:, None] * torch.arange(2047, -1, -1) / math.sqrt(64)
    variation = (bias.softmax(-1) - alibi.softmax(-1)).abs().sum(-1) / 2
    yield f"that bias is up to {short(max(away))} nats away from every straight line in i"
    yield f"by a total variation of {short(float(variation.max()))}"
    eight, nine = (exact_to(falcon_bias(n, 1, 600)) for n in (8, 9))
    assert nine < 10
    yield f"Only with 8 heads or fewer, whose slopes are powers of two, is it exact up to position {eight}"


def bridges(rows):
    assert len(OPTIONS) == 18
    yield f"for {len(OPTIONS) + len(REFUSED)} families with random weights"
    yield f"Eighteen hold, to 1e-6, in the tests. {', '.join(REFUSED[:3])} and {REFUSED[3]} do not"


def kinds(rows):
    assert KINDS_OF.startswith("5.24.")
    yield f"With transformers 5.24, {len(KINDS)} kinds hold at a tiny size, with random weights"
    page = (ROOT / "docs" / "released.md").read_text()
    table = [line.split(" | ") for line in page.splitlines() if " | `" in line]
    assert len(table) > 15
    for name, kind, _ in table:
        yield f"{name} | {kind} | {KINDS[kind.strip('`')]} |"


def mgm(rows):
    rows = pd.read_parquet(FOLDER / "mgm.parquet")
    assert rows.attrs["command"].startswith("probe measure mgm=")
    table = rows[rows["measurement"] == "table"]
    own, fresh = (table[table["control"] == control].set_index("metric") for control in ("none", "untrained"))
    yield (
        f"fills {own.loc['participation_ratio', 'value']:.0f} dimensions (participation ratio; a fresh table "
        f"{fresh.loc['participation_ratio', 'value']:.0f})"
    )
    cosine = own.loc["similarity"].set_index("lag")["value"]
    from_here = cosine.index[cosine >= 0].max() + 1
    assert (cosine.loc[from_here:] < 0).all() and len(cosine.loc[from_here:]) > 100
    yield (
        f"a cosine of {short(cosine[1])} on average, those of positions 50 apart {short(cosine[50])}, and from "
        f"{from_here} apart on it is below 0"
    )
    norm = own.loc["norm"].set_index("position")["value"]
    yield f"of position 0 has the largest norm: {norm[0]:.1f}, that of position 50 {short(norm[50])}"
    assert norm.idxmax() == 0


def mgm_probes(rows):
    rows = pd.read_parquet(FOLDER / "mgm.parquet")
    probes = rows[(rows["measurement"] == "probe") & (rows["site"] == "blocks.0.hook_resid_post")]
    of = probes.set_index(["metric", "control"])[["value", "low", "high"]]
    exact = [100 * of.loc[("accuracy", control)] for control in ("untrained", "none")]
    fresh, own = (f"{x['value']:.0f} % {between(x['low'], x['high'], 0)}" for x in exact)
    yield f"the exact position of {fresh} of the tokens of the untrained twin, and of {own} of the trained model's"
    fresh, own = (with_interval(of.loc[("r2", control)]) for control in ("untrained", "none"))
    yield f"has R² {fresh} untrained and {own} trained"
    use = rows[rows["measurement"] == "use"]
    loss = use[(use["metric"] == "loss") & (use["concept"] == "position")].set_index(["site", "control"])
    costs = loss.xs("none", level="control")
    worst = costs["value"].idxmax()
    yield (
        f"costs {with_interval(costs.loc[worst]).replace(']', '] nats a token')} before layer {worst.split('.')[1]}, a "
        f"random direction {short(loss.loc[(worst, 'random'), 'value'])}"
    )
    verdicts = position_used(use.dropna(axis=1, how="all")).query("concept == 'position'")
    used = [int(site.split(".")[1]) for site in verdicts.loc[verdicts["verdict"] == "used", "site"]]
    assert used == [*range(used[0], used[-1] + 1)] and len(verdicts) == 8
    n_random = round(1 / costs["p"].min()) - 1
    yield f"more than all {n_random} random directions cost before layers {used[0]} to {used[-1]}, and"
    assert used[0] == 0
    yield f"no more than chance before layers {used[-1] + 1} to {len(verdicts) - 1}"


def mgm_rest(rows):
    rows = pd.read_parquet(FOLDER / "mgm.parquet")
    shifted = rows[(rows["measurement"] == "shifted") & (rows["metric"] == "loss_change")].set_index("shift")
    one, sixteen, far = (with_interval(shifted.loc[by]) for by in (1, 16, 256))
    yield (
        f"shifted by 1 position the same tokens cost {one} nats a token more, by 16 {sixteen}, by 256 {far}. By 2 or 4 "
        f"they cost less ({short(shifted.loc[[2, 4], 'value'].mean())}) than by 1"
    )
    assert (shifted.loc[[2, 4], "high"] < shifted.loc[1, "low"]).all()
    templates = rows[(rows["measurement"] == "templates") & (rows["control"] == "none")]
    best = templates.loc[templates.groupby(["layer", "head"])["value"].idxmin()]
    nearest = best["template"].value_counts()
    mean, most = percent(best["explained"].mean()), percent(best["explained"].max())
    relative = nearest["sink_t5"] + nearest["sink_alibi"]
    yield (
        f"explains {mean} (mean over the {len(best)} heads; {most} of one). For {relative} heads that is a sink on the "
        f"first token beside a relative kernel, for {nearest['first_token_sink']} the sink alone"
    )


SECTIONS = (mgm, mgm_probes, mgm_rest, hybrids_table, hybrids_text, falcon, kinds, bridges)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_the_page_says_what_is_found(section, hybrids):
    Page("released.md").says(*section(hybrids))


def test_no_number_is_from_elsewhere(hybrids):
    page = Page("released.md")
    for section in SECTIONS:
        page.says(*section(hybrids))
    assert page.rest(NOT_MEASURED) == []


@pytest.mark.slow
def test_the_script_of_the_hybrids_makes_such_rows(hybrids, tmp_path):
    spec = importlib.util.spec_from_file_location("hybrids", FOLDER / "hybrids.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = script.measure(tmp_path, steps=2, seeds=1, n_train=600)
    assert set(rows.columns) == set(hybrids.columns)
    assert set(rows["rotary_layers"]) == set(hybrids["rotary_layers"]) and set(rows["metric"]) == set(hybrids["metric"])
