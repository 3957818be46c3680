import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from patterns import make_trace, random_pattern, with_garbage
from scipy import stats
from scipy.spatial.distance import jensenshannon

from probe.attention import AGGREGATES, compare_models, compare_to, pattern_distance
from probe.errors import ProbeError

LENGTHS = [7, 4, 6, 7, 2]


def three_models():
    return {
        "a": make_trace(random_pattern(5, 2, 7, 1), random_pattern(5, 2, 7, 2), lengths=LENGTHS),
        "b": make_trace(random_pattern(5, 3, 7, 3), random_pattern(5, 3, 7, 4), lengths=LENGTHS),
        "c": make_trace(random_pattern(5, 2, 7, 5, spread=3), random_pattern(5, 2, 7, 6), lengths=LENGTHS),
    }


def slow_layer_distance(p, q):
    """The mean over rows of JSD of the heads that are the nearest on the first two of five sequences, on the others, in
    plain loops; and which heads these are."""
    found = {}
    for h, k in itertools.product(range(p.shape[1]), range(q.shape[1])):
        each = [
            np.mean([jensenshannon(p[b, h, t], q[b, k, t]) ** 2 for t in range(length)])
            for b, length in enumerate(LENGTHS)
        ]
        found[h, k] = np.array(each)
    nearest = min(found, key=lambda heads: found[heads][:2].mean())
    return nearest, found[nearest][2:].mean()


def test_model_rows_equal_a_slow_loop():
    traces = three_models()
    rows = compare_models(traces, n_bootstrap=200)
    assert rows.columns.tolist() == [
        "model_a", "model_b", "scope", "layer", "head_a", "head_b", "metric", "value", "low", "high",
        "interval", "n", "aggregate", "n_seeds_a", "n_seeds_b",
    ]  # fmt: skip
    assert len(rows) == 3 * (2 + 1) and (rows["n"] == 3).all()
    assert (rows["aggregate"] == "minimum").all() and (rows["interval"] == "sequences").all()
    assert (rows[["n_seeds_a", "n_seeds_b"]] == 1).all(axis=None)
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


def test_heads_are_chosen_on_other_sequences_than_they_are_measured_on():
    """Two heads, one right on the first half of the sequences, the other on the second half: the one that is chosen on
    the first half is wrong on the second. The least mean over all sequences is half of that."""
    one, other = torch.eye(4), torch.eye(4)[[0, 0, 0, 0]]
    pattern = torch.stack([torch.stack([one, other])] * 3 + [torch.stack([other, one])] * 3)
    model = make_trace(one.expand(6, 1, 4, 4).contiguous())
    rows = compare_models({"a": make_trace(pattern), "b": model}, "total_variation", n_bootstrap=50)
    assert rows["value"].tolist() == [0.75, 0.75] and (rows["n"] == 3).all()


def test_the_distance_of_nearest_heads_is_not_too_small():
    """Of four heads that all lie equally far from the other model, but for noise, the distance is that of any, and its
    interval holds it as often as it says. The least of the four means was too small, and its interval held it in two
    of five cases."""
    n, values, least = 24, [], []
    for seed in range(60):
        heads = random_pattern(n, 4, 6, seed, spread=1.5)
        uniform = torch.ones(n, 1, 6, 6).tril().double() / torch.arange(1, 7)[:, None]
        trace_of = {"a": make_trace(heads), "b": make_trace(uniform)}
        row = compare_models(trace_of, n_bootstrap=200, seed=seed).iloc[-1]
        each = [float(pattern_distance(heads[:, [h]], trace_of["b"].pattern(0)).mean()) for h in range(4)]
        values.append((row["low"], row["value"], row["high"]))
        least.append(min(each))
    low, value, high = np.array(values).T
    many = random_pattern(4000, 1, 6, 999, spread=1.5)
    truth = float(pattern_distance(many, trace_of["b"].pattern(0)[:1].expand(4000, 1, 6, 6)).mean())
    covered = ((low <= truth) & (truth <= high)).mean()
    assert covered >= 0.85 and abs(value.mean() - truth) < 0.5 * (truth - np.mean(least))


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


def pair_distances(a, b, distance="jensen_shannon"):
    """D of each sequence for each two heads, one pair at a time, "head_a head_b sequence"."""
    return np.array(
        [[pattern_distance(a[:, [h]], b[:, [k]], distance, torch.tensor(LENGTHS))[:, 0].numpy()
          for k in range(b.shape[1])] for h in range(a.shape[1])]
    )  # fmt: skip


def pair_means(a, b, distance="jensen_shannon"):
    return pair_distances(a, b, distance).mean(-1)


def best_matching(mean):
    """The best one-to-one matching by going through all of them."""
    rows, columns = (range(size) for size in mean.shape)
    if len(rows) > len(columns):
        return [(h, k) for k, h in best_matching(mean.T)]
    return min(
        ([*zip(rows, order, strict=True)] for order in itertools.permutations(columns, len(rows))),
        key=lambda pairs: sum(mean[pair] for pair in pairs),
    )


@pytest.mark.parametrize("heads", [(3, 3), (2, 4), (4, 2), (1, 1)])
def test_matching_is_the_best_one_to_one_of_all(heads):
    a, b = (random_pattern(5, h, 7, seed) for seed, h in enumerate(heads))
    rows = compare_models(
        {n: make_trace(p, lengths=LENGTHS) for n, p in {"a": a, "b": b}.items()}, aggregate="matching"
    )
    each = pair_distances(a, b)
    pairs = best_matching(each[..., :2].mean(-1))
    np.testing.assert_allclose(rows["value"], np.mean([each[pair][2:].mean() for pair in pairs]), rtol=1e-12)
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
    assert (rows["interval"] == "none").all() and rows[["low", "high"]].isna().all(axis=None)
    # Equal heads at equal indices are what it cannot see.
    same = compare_models({"a": traces["a"], "b": traces["a"]}, "mcgill_compat", aggregate="mcgill", n_bootstrap=20)
    assert (same["value"] > 0).all()
    with pytest.raises(ProbeError, match="pairs of heads h < h′ want 2 heads or more, got 1 and 1"):
        one = make_trace(random_pattern(3, 1, 5))
        compare_models({"a": one, "b": one}, aggregate="mcgill")


@pytest.mark.parametrize("aggregate", [name for name in AGGREGATES if name != "mcgill"])
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


def test_with_several_seeds_the_interval_is_the_jackknifes_over_them():
    """The same sequences throughout: all that varies is the seed."""
    patterns = [random_pattern(1, 1, 6, s).expand(4, 1, 6, 6).contiguous() for s in range(5)]
    a, b = [make_trace(p) for p in patterns[:3]], [make_trace(p) for p in patterns[3:]]
    rows = compare_models({"a": a, "b": b, "one": b[0]}, n_bootstrap=20).query("scope == 'mean'")
    rows = rows.set_index(["model_a", "model_b"])
    apart = np.array([[float(pattern_distance(p[:1], q[:1])) for q in patterns] for p in patterns])
    each = apart[:3, 3:]
    # Of a mean over two samples, the jackknife's variance is that of the means of rows and of columns.
    v_a, v_b = each.mean(1).var(ddof=1) / 3, each.mean(0).var(ddof=1) / 2
    low, high = stats.t.interval(0.95, 1, loc=each.mean(), scale=np.sqrt(v_a + v_b))
    found = rows.loc["a", "b"]
    assert (found["value"], found["low"], found["high"]) == pytest.approx((each.mean(), low, high))
    assert found["interval"] == "both"
    # With itself: of the mean over the pairs of three seeds, without each seed in turn.
    own = [apart[i, j] for i, j in itertools.combinations(range(3), 2)]
    assert rows.loc[("a", "a"), "value"] == pytest.approx(np.mean(own))
    error = np.sqrt(2 / 3 * np.var(np.log(own), ddof=0) * 3)
    low, high = np.exp(stats.t.interval(0.95, 2, loc=np.log(np.mean(own)), scale=error))
    assert tuple(rows.loc[("a", "a"), ["low", "high"]]) == pytest.approx((low, high))
    # Of a single seed nothing is said of other trainings.
    assert rows.loc[("a", "one"), "interval"] == rows.loc[("b", "b"), "interval"] == "sequences"


def test_of_two_seeds_with_themselves_only_sequences_vary():
    a, b = (random_pattern(1, 1, 6, s).expand(4, 1, 6, 6).contiguous() for s in (1, 2))
    rows = compare_models({"m": [make_trace(a), make_trace(b)]}, n_bootstrap=100)
    want = float(pattern_distance(a[:1], b[:1]))
    assert rows[["value", "low", "high"]].to_numpy() == pytest.approx(want)
    assert rows["scope"].tolist() == ["layer", "mean"] and (rows["model_b"] == "m").all()


def test_infinite_distances_have_no_interval_over_trainings():
    eye = torch.eye(5).double().expand(4, 1, 5, 5).contiguous()
    soft = [make_trace(random_pattern(4, 1, 5, s)) for s in (1, 2)]
    rows = compare_models({"a": [*soft, make_trace(eye)], "b": soft}, "symmetric_kl", n_bootstrap=20)
    of_b = rows[rows["model_a"] != rows["model_b"]]
    assert (of_b["value"] == math.inf).all() and (of_b["interval"] == "none").all()
    assert of_b[["low", "high"]].isna().all(axis=None)


# ---- an order of models


def test_differences_to_a_reference_are_paired():
    traces = {"a": seeds_of(2), "b": seeds_of(3, 100), "c": seeds_of(1, 200, spread=4.0), "d": seeds_of(1, 300)}
    rows = compare_to(traces, "b", n_bootstrap=100)
    assert rows.columns.tolist() == [
        "reference", "model_a", "model_b", "metric", "aggregate", "value_a", "value_b", "value", "low", "high",
        "interval", "n", "n_seeds_reference", "n_seeds_a", "n_seeds_b",
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
        assert row.value == pytest.approx(value[row.model_a] - value[row.model_b], rel=1e-9)
        assert row.low <= row.value <= row.high and row.value <= 0
    assert (rows["n_seeds_reference"] == 3).all() and (rows["n"] == 3).all()


def test_a_model_and_its_copy_do_not_differ():
    traces = {"a": seeds_of(2), "b": seeds_of(1, 100), "copy": seeds_of(1, 100)}
    rows = compare_to(traces, "a", n_bootstrap=50)
    assert (rows[["value", "low", "high"]] == 0).all(axis=None)


def test_the_paired_interval_is_narrower_than_those_of_the_two():
    """X and Y lie a fixed step apart on every sequence, and every sequence lies somewhere else."""
    n = 30
    base = random_pattern(n, 1, 6, 0, spread=2.0)
    first = torch.eye(6).double()[0].expand(n, 1, 6, 6)
    x, y = 0.6 * base + 0.4 * first, 0.5 * base + 0.5 * first
    traces = {"reference": make_trace(base), "x": make_trace(x), "y": make_trace(y)}
    (row,) = compare_to(traces, "reference", "total_variation", n_bootstrap=300).itertuples()
    assert (row.model_a, row.model_b) == ("x", "y")
    assert row.value == pytest.approx(-row.value_a / 4, rel=1e-9)  # 0.4 and 0.5 of the same
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
