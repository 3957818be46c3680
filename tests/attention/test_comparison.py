import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from patterns import make_trace, random_pattern, with_garbage
from scipy.spatial.distance import jensenshannon

from probe.attention import (
    DISTANCES,
    TEMPLATES,
    check_pattern,
    compare_templates,
    nearest_template,
    pattern_distance,
)
from probe.attention.nulls import shuffled
from probe.errors import ProbeError
from probe.models.decoder import Decoder, DecoderConfig
from probe.tracing import PATTERN, trace


def positional_decoder(encoding, **options):
    """A decoder whose attention sees nothing but the encoding's bias: W_Q is 0."""
    config = DecoderConfig(d_vocab=11, n_ctx=40, n_layers=2, d_model=16, n_heads=4, encoding=encoding, **options)
    decoder = Decoder(config, seed=0)
    with torch.no_grad():
        for block in decoder.layers:
            block.attention.q_proj.weight.zero_()
            block.attention.q_proj.bias.zero_()
        if encoding == "t5":
            decoder.encoding.weight.normal_(generator=torch.Generator().manual_seed(1))
    return decoder


def tokens(n_sequences=6, n=40):
    return torch.randint(11, (n_sequences, n), generator=torch.Generator().manual_seed(2))


def test_an_alibi_decoder_is_nearest_to_alibi():
    observed = trace(positional_decoder("alibi"), tokens(), [PATTERN])
    rows = compare_templates(observed, distances=list(DISTANCES), n_bootstrap=20)
    alibi = rows[rows["template"].isin(["alibi", "alibi_fitted"])]
    assert (alibi["value"] < 1e-5).all()
    assert alibi["slope"].to_numpy().reshape(2, 4, -1)[..., 0] == pytest.approx(
        np.array([[2.0 ** (-2 * k) for k in (1, 2, 3, 4)]] * 2), rel=1e-4
    )
    fixed = rows[rows["n_parameters"] == 0]
    for distance in DISTANCES:
        best = nearest_template(fixed, distance)
        assert best["template"].tolist() == ["alibi"] * 8
        assert list(zip(best["layer"], best["head"], strict=True)) == list(itertools.product(range(2), range(4)))


def test_a_t5_decoder_is_nearest_to_its_own_table():
    decoder = positional_decoder("t5", encoding_options={"max_distance": 30})
    observed = trace(decoder, tokens(), [PATTERN])
    rows = compare_templates(observed, t5_table=decoder.encoding.weight, t5_max_distance=30, n_bootstrap=20)
    best = nearest_template(rows)
    assert best["template"].tolist() == ["t5"] * 8
    assert (best["value"] < 1e-10).all() and best["slope"].isna().all()
    # With other buckets the same table is another template.
    other = compare_templates(observed, ["t5"], t5_table=decoder.encoding.weight, n_bootstrap=20)
    assert (other["value"] > 1e-5).all()


def test_a_nope_decoder_without_queries_is_uniform():
    observed = trace(positional_decoder("none"), tokens(), [PATTERN])
    best = nearest_template(compare_templates(observed, n_bootstrap=20))
    assert best["value"].max() < 1e-10
    fitted = {name for name, n in best.set_index("template")["n_parameters"].items() if n}
    assert set(best["template"]) <= {"uniform"} | fitted  # all of these hold the uniform pattern
    assert best["explained"].isna().all()


def test_fitted_on_the_first_half_and_measured_on_the_second():
    slope = {0: 0.5, 1: 0.1}  # of each half
    distance = torch.arange(12).view(-1, 1) - torch.arange(12)
    halves = [(-slope[half] * distance.double()).masked_fill(distance < 0, -math.inf).softmax(-1) for half in (0, 1)]
    pattern = torch.stack([halves[0]] * 2 + [halves[1]] * 3)[:, None]
    rows = compare_templates(make_trace(pattern), ["alibi_fitted", "uniform"], n_bootstrap=10).set_index("template")
    assert rows.loc["alibi_fitted", "slope"] == pytest.approx(0.5, abs=1e-6)
    want = pattern_distance(halves[0][None, None], halves[1][None, None])
    assert rows.loc["alibi_fitted", "value"] == pytest.approx(float(want), abs=1e-8)
    assert (rows["n"] == 3).all()
    uniform = TEMPLATES["uniform"](pattern).pattern[None]
    assert rows.loc["uniform", "value"] == pytest.approx(float(pattern_distance(uniform, halves[1][None, None])))
    assert rows["n_parameters"].to_dict() == {"alibi_fitted": 1, "uniform": 0}


def test_template_rows_equal_a_slow_loop():
    lengths = [9, 5, 7, 2, 9, 4, 8]
    observed = make_trace(random_pattern(7, 2, 9, 1), random_pattern(7, 3, 9, 2), lengths=lengths)
    rows = compare_templates(observed, ["uniform", "alibi"], ["jensen_shannon", "wasserstein"], n_bootstrap=50)
    assert len(rows) == (2 + 3) * 2 * 2
    assert not rows.drop(columns=["slope", "null_seed", "null_seed_low", "null_seed_high"]).isna().any(axis=None)
    for row in rows[rows["metric"] == "jensen_shannon"].itertuples():
        pattern = observed.pattern(row.layer)
        template = TEMPLATES[row.template](pattern).pattern[row.head]
        each = [
            np.mean([jensenshannon(pattern[b, row.head, t], template[t]) ** 2 for t in range(lengths[b])])
            for b in range(3, 7)
        ]
        assert row.value == pytest.approx(np.mean(each), abs=1e-12)
        assert min(each) <= row.low <= row.value <= row.high <= max(each)


def test_rows_are_tidy_and_reproducible():
    observed = make_trace(random_pattern(6, 2, 8, 1).float())
    before = observed.pattern(0).clone()
    rows = compare_templates(observed, n_bootstrap=30)
    assert rows.columns.tolist() == [
        "layer", "head", "template", "metric", "value", "low", "high", "n", "n_parameters", "slope", "explained",
        "null_uniform", "null_shuffled", "null_shuffled_low", "null_shuffled_high",
        "null_seed", "null_seed_low", "null_seed_high",
    ]  # fmt: skip
    without = compare_templates(observed, nulls=False, n_bootstrap=30)
    pd.testing.assert_frame_equal(without, rows[without.columns])
    assert without.columns[-1] == "explained"
    assert not rows.duplicated(["layer", "head", "template", "metric"]).any()
    pd.testing.assert_frame_equal(rows, compare_templates(observed, n_bootstrap=30))
    assert not rows["low"].equals(compare_templates(observed, n_bootstrap=30, seed=1)["low"])
    assert torch.equal(observed.pattern(0), before)


def test_fits_respect_the_lengths():
    observed = make_trace(random_pattern(5, 2, 9, 1), lengths=[9, 3, 5, 9, 9])
    rows = compare_templates(with_garbage(observed), ["alibi_fitted"], n_bootstrap=5)
    want = TEMPLATES["alibi_fitted"](observed.pattern(0)[:2], observed.lengths[:2]).parameters["slope"]
    np.testing.assert_allclose(rows["slope"], want, atol=1e-9)


def test_infinite_distances_stay_infinite():
    rows = compare_templates(make_trace(random_pattern(6, 1, 8)), ["diagonal"], ["symmetric_kl"], n_bootstrap=10)
    assert rows[["value", "low", "high"]].to_numpy().tolist() == [[math.inf] * 3]
    assert nearest_template(rows, "symmetric_kl")["template"].tolist() == ["diagonal"]


def test_padding_changes_no_template_row():
    observed = make_trace(random_pattern(6, 2, 8, 1), lengths=[8, 3, 5, 8, 1, 6])
    want = compare_templates(observed, n_bootstrap=20)
    pd.testing.assert_frame_equal(compare_templates(with_garbage(observed), n_bootstrap=20), want)
    full = compare_templates(dataclasses.replace(observed, lengths=torch.full((6,), 8)), n_bootstrap=20)
    assert not full["value"].equals(want["value"])


def test_low_precision_patterns_are_brought_to_sum_1():
    pattern = random_pattern(6, 2, 64, 1)
    exact = compare_templates(make_trace(pattern), ["uniform", "alibi"], ["wasserstein"], n_bootstrap=10)
    rounded = compare_templates(make_trace(pattern.bfloat16()), ["uniform", "alibi"], ["wasserstein"], n_bootstrap=10)
    np.testing.assert_allclose(rounded["value"], exact["value"], atol=0.02)
    scaled = make_trace(pattern.float() * 1.0002)
    scaled = compare_templates(scaled, ["uniform", "alibi"], ["wasserstein"], n_bootstrap=10)
    np.testing.assert_allclose(scaled["value"], exact["value"], atol=1e-5)


def test_nearest_template_keeps_other_keys_apart():
    a = compare_templates(make_trace(random_pattern(4, 2, 6, 1)), ["uniform", "diagonal"], n_bootstrap=5)
    rows = pd.concat([a.assign(model="a"), a.assign(model="b")])
    best = nearest_template(rows)
    assert best["model"].tolist() == ["a", "a", "b", "b"] and set(best["template"]) == {"uniform"}
    with pytest.raises(ProbeError, match=r"unknown distance in these rows 'hellinger'; known: jensen_shannon"):
        nearest_template(rows, "hellinger")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"templates": ["alibi", "cosine"]}, "unknown template 'cosine'; known: alibi, alibi_fitted"),
        ({"distances": ["l2"]}, "unknown distance 'l2'"),
        ({"templates": []}, "at least one template is wanted, got none"),
        ({"templates": ["t5"]}, "wants a trained T5 table"),
        ({"t5_table": torch.zeros(32, 5)}, r"n_buckets × 2 heads, got \(32, 5\)"),
        ({"n_bootstrap": 0}, "n_bootstrap must be at least 1, got 0"),
        ({"confidence": 1.0}, r"confidence must be in \(0, 1\), got 1.0"),
    ],
)
def test_compare_templates_refuses(arguments, message):
    with pytest.raises(ProbeError, match=message):
        compare_templates(make_trace(random_pattern(4, 2, 6)), **arguments)


def test_compare_templates_refuses_bad_traces():
    with pytest.raises(ProbeError, match=r"at least 2 distinct sequences, .* got 1"):
        compare_templates(make_trace(random_pattern(1, 2, 6)))
    with pytest.raises(ProbeError, match=r"layer 1: a pattern wants rows that sum to 1 .* row 0 sums to 2"):
        compare_templates(make_trace(random_pattern(2, 2, 6), 2 * random_pattern(2, 2, 6)))
    with pytest.raises(ProbeError, match=r"the trace holds no '.*attn\.hook_pattern'"):
        compare_templates(dataclasses.replace(make_trace(random_pattern(2, 2, 6)), values={}))


# ---- what a value is held against


def sequences(*heads, n=20, seed=0, noise=0.0):
    """n sequences of heads with these biases by distance, and content: scores that differ from one to the next."""
    scores = torch.stack([torch.as_tensor(head, dtype=torch.float64) for head in heads])
    length = scores.shape[-1]
    index = torch.arange(length)
    bias = scores[:, (index[:, None] - index).clamp(min=0)].expand(n, -1, -1, -1)
    content = noise * torch.randn(bias.shape, generator=torch.Generator().manual_seed(seed)).double()
    return (bias + content).masked_fill(index > index[:, None], -math.inf).softmax(-1)


def test_explained_is_the_share_of_the_distance_from_uniform():
    observed = make_trace(random_pattern(6, 2, 8, 1), lengths=[8, 3, 5, 8, 1, 6])
    rows = compare_templates(observed, ["uniform", "alibi_fitted", "diagonal"], list(DISTANCES), n_bootstrap=5)
    uniform = rows[rows["template"] == "uniform"].set_index(["layer", "head", "metric"])["value"]
    far = uniform.reindex(pd.MultiIndex.from_frame(rows[["layer", "head", "metric"]])).to_numpy()
    np.testing.assert_array_equal(rows["null_uniform"], far)
    np.testing.assert_allclose(rows["explained"], 1 - rows["value"] / far, rtol=1e-12)
    assert (rows.loc[rows["template"] == "uniform", "explained"] == 0).all()
    assert rows["explained"].max() <= 1
    infinite = rows[(rows["template"] == "diagonal") & (rows["metric"] == "symmetric_kl")]
    assert (infinite["explained"] == -math.inf).all()


def test_a_head_that_is_its_template_is_explained_and_far_from_its_nulls():
    exact = make_trace(sequences(-0.5 * np.arange(20), [3.0] * 4 + [0.0] * 16))
    rows = compare_templates(exact, ["alibi_fitted", "window"], n_bootstrap=50).set_index(["head", "template"])
    for head, template in [(0, "alibi_fitted"), (1, "window")]:
        row = rows.loc[(head, template)]
        assert row["explained"] == pytest.approx(1, abs=1e-9)
        assert row["value"] < 1e-9 < row["null_shuffled_low"] <= row["null_shuffled"] <= row["null_shuffled_high"]


def test_heads_without_an_order_of_keys_are_as_near_as_their_shuffled_null():
    observed = make_trace(sequences([0.0] * 12, n=200, noise=1.5))
    rows = compare_templates(observed, ["uniform", "alibi_fitted", "t5_fitted", "sink_alibi"], n_bootstrap=200)
    assert ((rows["null_shuffled_low"] < rows["value"]) & (rows["value"] < rows["null_shuffled_high"])).all()
    # Shuffling changes no distance from uniform attention; here the two differ by the rounding of their sums.
    uniform = rows[rows["template"] == "uniform"]
    np.testing.assert_allclose(uniform["null_shuffled"], uniform["value"], rtol=1e-12)


def test_shuffled_rows_hold_the_same_weights_in_every_order():
    pattern = random_pattern(4000, 1, 3, 1)
    got = shuffled(pattern, torch.arange(1, pattern.shape[-1] + 1), np.random.default_rng(0))
    check_pattern(got)
    torch.testing.assert_close(got.sort(-1).values, pattern.sort(-1).values, rtol=0, atol=0)
    # Each of the six orders of the last row's keys is as frequent as the others: 6 times 667 expected, χ² of 5.
    order = (got[:, 0, 2, :, None] == pattern[:, 0, 2, None]).int().argmax(-1)
    _, count = torch.unique(order, dim=0, return_counts=True)
    assert len(count) == 6 and scipy.stats.chisquare(count.numpy()).pvalue > 0.01
    assert torch.equal(got, shuffled(pattern, torch.arange(1, pattern.shape[-1] + 1), np.random.default_rng(0)))
    assert not torch.equal(got, shuffled(pattern, torch.arange(1, pattern.shape[-1] + 1), np.random.default_rng(1)))


def test_null_seed_is_the_nearest_head_chosen_on_the_first_half():
    lengths = [9, 5, 7, 2, 9, 4, 8]
    one, other = (make_trace(random_pattern(7, h, 9, s), random_pattern(7, h, 9, s + 1), lengths=lengths)
                  for h, s in ((2, 1), (3, 5)))  # fmt: skip
    rows = compare_templates(one, ["uniform"], ["jensen_shannon", "wasserstein"], other_seed=other, n_bootstrap=40)
    for row in rows.itertuples():
        p, q = one.pattern(row.layer)[:, [row.head]], other.pattern(row.layer)
        each = pattern_distance(p, q, row.metric, one.lengths)
        want = each[3:, each[:3].mean(0).argmin()]
        assert row.null_seed == pytest.approx(float(want.mean()), rel=1e-12)
        assert (
            want.min() * (1 - 1e-12)
            <= row.null_seed_low
            <= row.null_seed
            <= row.null_seed_high
            <= want.max() * (1 + 1e-12)
        )
    same = compare_templates(one, ["uniform"], other_seed=one, n_bootstrap=5)
    assert (same[["null_seed", "null_seed_low", "null_seed_high"]] == 0).all(axis=None)
    with pytest.raises(ProbeError, match="'the trace' has 2 layers and 'the other seed' 1"):
        compare_templates(one, other_seed=make_trace(random_pattern(7, 2, 8)))


def test_sequences_of_length_1_are_all_alike():
    rows = compare_templates(make_trace(torch.ones(4, 2, 1, 1)), n_bootstrap=5)
    assert (rows[["value", "low", "high", "null_uniform", "null_shuffled"]].abs() < 1e-15).all(axis=None)
    assert rows["explained"].isna().all() and (rows["n_parameters"] == 0).all()


def test_one_head_that_is_uniform_and_short_sequences_among_long_ones():
    pattern = sequences([0.0] * 6, n=4)
    rows = compare_templates(make_trace(pattern, lengths=[1, 1, 6, 1]), n_bootstrap=5)
    assert rows["value"].notna().all() and rows["explained"].isna().all()
    assert (rows.loc[rows["n_parameters"] > 0, "value"] < 1e-9).all()  # nothing to fit to: nothing fitted
