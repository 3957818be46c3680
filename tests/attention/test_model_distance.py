import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from patterns import make_trace, random_pattern, with_garbage
from scipy.spatial.distance import jensenshannon

from probe.attention import AGGREGATES, compare_models, compare_to, pattern_distance
from probe.bootstrap import drawn_shares
from probe.errors import ProbeError

LENGTHS = [7, 4, 6, 7, 2]


def three_models():
    return {
        "a": make_trace(random_pattern(5, 2, 7, 1), random_pattern(5, 2, 7, 2), lengths=LENGTHS),
        "b": make_trace(random_pattern(5, 3, 7, 3), random_pattern(5, 3, 7, 4), lengths=LENGTHS),
        "c": make_trace(random_pattern(5, 2, 7, 5, spread=3), random_pattern(5, 2, 7, 6), lengths=LENGTHS),
    }


def slow_layer_distance(p, q):
    """min over (h, h') of the mean over sequences of the mean over rows of JSD, in plain loops."""
    found = {}
    for h, k in itertools.product(range(p.shape[1]), range(q.shape[1])):
        each = [
            np.mean([jensenshannon(p[b, h, t], q[b, k, t]) ** 2 for t in range(length)])
            for b, length in enumerate(LENGTHS)
        ]
        found[h, k] = np.mean(each)
    return min(found.items(), key=lambda item: item[1])


def test_model_rows_equal_a_slow_loop():
    traces = three_models()
    rows = compare_models(traces, n_bootstrap=200)
    assert rows.columns.tolist() == [
        "model_a", "model_b", "scope", "layer", "head_a", "head_b", "distance", "value", "low", "high", "n",
        "aggregate", "n_seeds_a", "n_seeds_b",
    ]  # fmt: skip
    assert len(rows) == 3 * (2 + 1) and (rows["n"] == 5).all()
    assert (rows["aggregate"] == "minimum").all() and (rows[["n_seeds_a", "n_seeds_b"]] == 1).all(axis=None)
    for a, b in [("a", "b"), ("a", "c"), ("b", "c")]:
        pair = rows[(rows["model_a"] == a) & (rows["model_b"] == b)]
        assert pair["scope"].tolist() == ["layer", "layer", "mean"]
        assert pair["layer"].tolist() == [0, 1, pd.NA]
        want = [slow_layer_distance(traces[a].pattern(layer), traces[b].pattern(layer)) for layer in (0, 1)]
        np.testing.assert_allclose(pair["value"][:-1], [value for _, value in want], atol=1e-12)
        assert list(zip(pair["head_a"][:-1], pair["head_b"][:-1], strict=True)) == [heads for heads, _ in want]
        assert pair["value"].iloc[-1] == pytest.approx(np.mean([value for _, value in want]), abs=1e-12)


def test_model_distance_is_symmetric():
    traces = three_models()
    there = compare_models({"a": traces["a"], "b": traces["b"]}, "mcgill_compat", n_bootstrap=20)
    back = compare_models({"b": traces["b"], "a": traces["a"]}, "mcgill_compat", n_bootstrap=20)
    for column in ("value", "low", "high"):
        np.testing.assert_allclose(there[column], back[column], rtol=1e-12)


def test_a_model_with_its_heads_permuted_is_the_same_model():
    pattern = random_pattern(5, 4, 7, 1)
    rows = compare_models({"a": make_trace(pattern), "b": make_trace(pattern[:, [2, 0, 3, 1]])}, n_bootstrap=20)
    assert (rows[["value", "low", "high"]] == 0).all(axis=None)


def test_the_interval_retakes_the_minimum():
    # Two heads, each right on the sequences where the other is wrong: in a draw the better one may be either.
    one, other = torch.eye(4), torch.eye(4)[[0, 0, 0, 0]]
    pattern = torch.stack([torch.stack([one, other])] * 3 + [torch.stack([other, one])] * 3)
    model = make_trace(one.expand(6, 1, 4, 4).contiguous())
    rows = compare_models({"a": make_trace(pattern), "b": model}, "total_variation", n_bootstrap=500)
    assert rows["value"].tolist() == [0.375, 0.375]
    assert rows["high"].tolist() == pytest.approx([0.375, 0.375]) and (rows["low"] < 0.2).all()


def test_intervals_hold_the_value_of_sane_data():
    traces = {name: make_trace(random_pattern(60, 1, 6, seed)) for name, seed in (("a", 1), ("b", 2))}
    rows = compare_models(traces)
    assert ((rows["low"] < rows["value"]) & (rows["value"] < rows["high"])).all()
    wide = compare_models(traces, confidence=0.999)
    assert ((wide["low"] < rows["low"]) & (rows["high"] < wide["high"])).all()


def test_padding_changes_no_model_row():
    traces = three_models()
    spoiled = {name: with_garbage(t) for name, t in traces.items()} | {"a": traces["a"]}
    pd.testing.assert_frame_equal(compare_models(spoiled, n_bootstrap=20), compare_models(traces, n_bootstrap=20))


def test_compare_models_refuses():
    one = make_trace(random_pattern(3, 2, 5))
    with pytest.raises(ProbeError, match="at least 2 models, got 1: a"):
        compare_models({"a": one})
    with pytest.raises(ProbeError, match="'a' has 1 layers and 'b' 2"):
        compare_models({"a": one, "b": make_trace(*[random_pattern(3, 2, 5)] * 2)})
    with pytest.raises(ProbeError, match=r"same tokens, got shapes \(3, 5\) and \(3, 6\)"):
        compare_models({"a": one, "b": make_trace(random_pattern(3, 2, 6))})
    with pytest.raises(ProbeError, match="same lengths, but those of sequence 1 are 5 and 4"):
        compare_models({"a": one, "b": make_trace(random_pattern(3, 2, 5), lengths=[5, 4, 5])})
    other = one.tokens.clone()
    other[2, 3] = 99
    with pytest.raises(ProbeError, match="sequence 2 differs at position 3: 13 and 99"):
        compare_models({"a": one, "b": dataclasses.replace(one, tokens=other)})
    with pytest.raises(ProbeError, match="unknown distance 'l2'"):
        compare_models({"a": one, "b": one}, "l2")
    with pytest.raises(ProbeError, match="model 'b', layer 0: a pattern wants weights >= 0"):
        compare_models({"a": one, "b": make_trace(-random_pattern(3, 2, 5))})


# ---- ways to make one number of the pairs of heads


def pair_means(a, b, distance="jensen_shannon"):
    """The mean over sequences of D for each two heads, one pair at a time."""
    return np.array(
        [[float(pattern_distance(a[:, [h]], b[:, [k]], distance, torch.tensor(LENGTHS)).mean())
          for k in range(b.shape[1])] for h in range(a.shape[1])]
    )  # fmt: skip


@pytest.mark.parametrize("heads", [(3, 3), (2, 4), (4, 2), (1, 1)])
def test_matching_is_the_best_one_to_one_of_all(heads):
    a, b = (random_pattern(5, h, 7, seed) for seed, h in enumerate(heads))
    rows = compare_models(
        {n: make_trace(p, lengths=LENGTHS) for n, p in {"a": a, "b": b}.items()}, aggregate="matching"
    )
    mean = pair_means(a, b)
    if heads[0] > heads[1]:
        mean = mean.T
    best = min(
        np.mean([mean[h, k] for h, k in enumerate(columns)])
        for columns in itertools.permutations(range(mean.shape[1]), mean.shape[0])
    )
    np.testing.assert_allclose(rows["value"], best, rtol=1e-12)
    assert (rows["aggregate"] == "matching").all() and rows[["head_a", "head_b"]].isna().all(axis=None)
    assert ((rows["low"] <= rows["value"]) & (rows["value"] <= rows["high"])).all()


def test_matching_avoids_infinite_pairs_where_it_can():
    eye, other = torch.eye(5).double(), random_pattern(5, 1, 5)
    a = torch.cat([eye.expand(5, 1, 5, 5), other], dim=1)
    traces = {"a": make_trace(a), "b": make_trace(a.flip(1))}
    assert (compare_models(traces, "symmetric_kl", aggregate="matching", n_bootstrap=5)["value"] == 0).all()
    traces["b"] = make_trace(a[:, [1, 1]])
    assert (compare_models(traces, "symmetric_kl", aggregate="matching", n_bootstrap=5)["value"] == math.inf).all()


def test_mcgill_takes_pairs_above_the_diagonal_only():
    a, b = random_pattern(5, 3, 7, 1), random_pattern(5, 3, 7, 2)
    traces = {"a": make_trace(a, lengths=LENGTHS), "b": make_trace(b, lengths=LENGTHS)}
    rows = compare_models(traces, "mcgill_compat", aggregate="mcgill", n_bootstrap=20)
    mean = pair_means(a, b, "mcgill_compat")
    want = min((mean[h, k], h, k) for h, k in itertools.combinations(range(3), 2))
    assert rows["value"].tolist() == pytest.approx([want[0]] * 2, rel=1e-12)
    assert (rows["head_a"][0], rows["head_b"][0]) == want[1:]
    # Equal heads at equal indices are what it cannot see.
    same = compare_models({"a": traces["a"], "b": traces["a"]}, "mcgill_compat", aggregate="mcgill", n_bootstrap=20)
    assert (same["value"] > 0).all()
    with pytest.raises(ProbeError, match="pairs of heads h < h′ want 2 heads or more, got 1 and 1"):
        one = make_trace(random_pattern(3, 1, 5))
        compare_models({"a": one, "b": one}, aggregate="mcgill")


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_intervals_of_every_aggregate_are_over_sequences(aggregate):
    traces = {n: make_trace(random_pattern(40, 3, 6, s)) for n, s in (("a", 1), ("b", 2))}
    rows = compare_models(traces, aggregate=aggregate, n_bootstrap=400)
    assert ((rows["low"] < rows["value"]) & (rows["value"] < rows["high"])).all()
    assert ((rows["high"] - rows["low"]) < rows["value"]).all()


# ---- seeds


def seeds_of(n, first=0, layers=2, spread=1.0):
    return [make_trace(*(random_pattern(5, 2, 7, first + 10 * s + layer, spread) for layer in range(layers)),
                       lengths=LENGTHS) for s in range(n)]  # fmt: skip


def test_several_seeds_are_the_mean_over_their_pairs():
    traces = {"a": seeds_of(3), "b": seeds_of(2, 100), "c": seeds_of(1, 200)[0]}
    rows = compare_models(traces, n_bootstrap=50)
    assert list(dict.fromkeys(zip(rows["model_a"], rows["model_b"], strict=True))) == [
        ("a", "a"), ("a", "b"), ("a", "c"), ("b", "b"), ("b", "c"),
    ]  # fmt: skip
    for (a, b), pair in rows.groupby(["model_a", "model_b"]):
        of_a, of_b = (t if isinstance(t, list) else [t] for t in (traces[a], traces[b]))
        pairs = list(itertools.combinations(of_a, 2) if a == b else itertools.product(of_a, of_b))
        single = [compare_models({"x": p, "y": q}, n_bootstrap=5)["value"].to_numpy() for p, q in pairs]
        np.testing.assert_allclose(pair["value"], np.mean(single, axis=0), rtol=1e-12)
        assert (pair["n_seeds_a"] == len(of_a)).all() and (pair["n_seeds_b"] == len(of_b)).all()
        assert pair["head_a"].isna().all() == (len(pairs) > 1)
        assert ((pair["low"] <= pair["value"]) & (pair["value"] <= pair["high"])).all()


def test_a_list_of_one_seed_is_that_seed():
    traces = three_models()
    rows = compare_models({name: [t] for name, t in traces.items()}, n_bootstrap=30)
    pd.testing.assert_frame_equal(rows, compare_models(traces, n_bootstrap=30))


def test_the_interval_is_over_seeds_too():
    # The same sequences throughout: all that varies is which seeds are drawn, and their distances are known.
    patterns = [random_pattern(1, 1, 6, s).expand(4, 1, 6, 6).contiguous() for s in range(4)]
    a, b = [make_trace(p) for p in patterns[:3]], make_trace(patterns[3])
    rows = compare_models({"a": a, "b": b}, n_bootstrap=3000, confidence=0.99)
    of_b = rows[rows["model_b"] == "b"]
    each = np.array([float(pattern_distance(p[:1], patterns[3][:1])) for p in patterns[:3]])
    # One draw in 27 holds one seed only, so the 0.5 % percentiles are the single nearest and the single furthest.
    assert of_b["low"].tolist() == pytest.approx([each.min()] * 2, rel=1e-9)
    assert of_b["high"].tolist() == pytest.approx([each.max()] * 2, rel=1e-9)
    # With itself: pairs of different seeds, at least one in each draw.
    own = [float(pattern_distance(p[:1], q[:1])) for p, q in itertools.combinations(patterns[:3], 2)]
    of_a = rows[rows["model_b"] == "a"]
    assert of_a["value"].tolist() == pytest.approx([np.mean(own)] * 2)
    assert of_a["low"].tolist() == pytest.approx([min(own)] * 2) and of_a["high"].tolist() == pytest.approx(
        [max(own)] * 2
    )


def test_of_two_seeds_with_themselves_only_sequences_vary():
    a, b = (random_pattern(1, 1, 6, s).expand(4, 1, 6, 6).contiguous() for s in (1, 2))
    rows = compare_models({"m": [make_trace(a), make_trace(b)]}, n_bootstrap=100)
    want = float(pattern_distance(a[:1], b[:1]))
    assert rows[["value", "low", "high"]].to_numpy() == pytest.approx(want)
    assert rows["scope"].tolist() == ["layer", "mean"] and (rows["model_b"] == "m").all()


def test_an_infinite_seed_that_is_not_drawn_leaves_the_others_finite():
    eye = torch.eye(5).double().expand(4, 1, 5, 5).contiguous()
    soft = [make_trace(random_pattern(4, 1, 5, s)) for s in (1, 2)]
    rows = compare_models({"a": [*soft, make_trace(eye)], "b": soft[0]}, "symmetric_kl", n_bootstrap=200)
    of_b = rows[rows["model_b"] == "b"]
    assert (of_b["value"] == math.inf).all() and (of_b["high"] == math.inf).all() and of_b["low"].max() < math.inf
    assert not rows[["value", "low", "high"]].isna().any(axis=None)


def test_drawn_shares_hold_as_many_different_things_as_wanted():
    shares = drawn_shares(3, 2000, torch.Generator().manual_seed(0), at_least=2)
    distinct = (shares > 0).sum(1)
    assert distinct.min() == 2 and torch.equal(shares.sum(1), torch.ones(2000).double())
    # Of the 24 draws of 3 of 3 that hold 2 or 3 different ones, 6 hold all.
    assert float((distinct == 3).double().mean()) == pytest.approx(6 / 24, abs=0.03)


# ---- an order of models


def test_differences_to_a_reference_are_paired():
    traces = {"a": seeds_of(2), "b": seeds_of(3, 100), "c": seeds_of(1, 200, spread=4.0), "d": seeds_of(1, 300)}
    rows = compare_to(traces, "b", n_bootstrap=100)
    assert rows.columns.tolist() == [
        "reference", "model_a", "model_b", "distance", "aggregate", "value_a", "value_b", "difference", "low", "high",
        "n", "n_seeds_reference", "n_seeds_a", "n_seeds_b",
    ]  # fmt: skip
    pairs = compare_models(traces, n_bootstrap=5).query("scope == 'mean'")
    value = {
        next(m for m in (row.model_a, row.model_b) if m != "b"): row.value
        for row in pairs.itertuples()
        if (row.model_a == "b") != (row.model_b == "b")
    }
    order = sorted(value, key=value.get)
    assert list(zip(rows["model_a"], rows["model_b"], strict=True)) == list(itertools.combinations(order, 2))
    for row in rows.itertuples():
        assert row.value_a == pytest.approx(value[row.model_a], rel=1e-12)
        assert row.difference == pytest.approx(value[row.model_a] - value[row.model_b], rel=1e-9)
        assert row.low <= row.difference <= row.high and row.difference <= 0
    assert (rows["n_seeds_reference"] == 3).all() and (rows["n"] == 5).all()


def test_a_model_and_its_copy_do_not_differ():
    traces = {"a": seeds_of(2), "b": seeds_of(1, 100), "copy": seeds_of(1, 100)}
    rows = compare_to(traces, "a", n_bootstrap=50)
    assert (rows[["difference", "low", "high"]] == 0).all(axis=None)


def test_the_paired_interval_is_narrower_than_those_of_the_two():
    """X and Y lie a fixed step apart on every sequence, and every sequence lies somewhere else."""
    n = 30
    base = random_pattern(n, 1, 6, 0, spread=2.0)
    first = torch.eye(6).double()[0].expand(n, 1, 6, 6)
    x, y = 0.6 * base + 0.4 * first, 0.5 * base + 0.5 * first
    traces = {"reference": make_trace(base), "x": make_trace(x), "y": make_trace(y)}
    (row,) = compare_to(traces, "reference", "total_variation", n_bootstrap=300).itertuples()
    assert (row.model_a, row.model_b) == ("x", "y")
    assert row.difference == pytest.approx(-row.value_a / 4, rel=1e-9)  # 0.4 and 0.5 of the same
    single = compare_models({k: traces[k] for k in ("reference", "y")}, "total_variation", n_bootstrap=300).iloc[-1]
    assert row.high < 0 and row.high - row.low < (single["high"] - single["low"]) / 2


def test_compare_to_refuses():
    one = make_trace(random_pattern(3, 1, 5))
    traces = {"a": one, "b": one, "c": one}
    with pytest.raises(ProbeError, match="unknown reference model 'd'; known: a, b, c"):
        compare_to(traces, "d")
    with pytest.raises(ProbeError, match="at least 2 beside the reference, got b"):
        compare_to({"a": one, "b": one}, "a")
    with pytest.raises(ProbeError, match="finite distances, but that of 'a' and 'b' is infinite"):
        compare_to(traces | {"b": make_trace(torch.eye(5).expand(3, 1, 5, 5))}, "a", "symmetric_kl")
    with pytest.raises(ProbeError, match="unknown aggregate 'mean'; known: matching, mcgill, minimum"):
        compare_models(traces, aggregate="mean")
    with pytest.raises(ProbeError, match="got none of 'b'"):
        compare_models({"a": one, "b": []})
    with pytest.raises(ProbeError, match="at least 2 models, got 0"):
        compare_models({})
