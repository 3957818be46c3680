import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from probe.attention import (
    DISTANCES,
    TEMPLATES,
    compare_models,
    compare_templates,
    nearest_template,
    pattern_distance,
)
from probe.attention.bootstrap import Bootstrap
from probe.errors import ProbeError
from probe.models.decoder import Decoder, DecoderConfig
from probe.tracing import PATTERN, Trace, block_site, trace


def random_pattern(batch, head, n, seed=0, spread=1.0):
    scores = spread * torch.randn(batch, head, n, n, generator=torch.Generator().manual_seed(seed)).double()
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf).softmax(-1)


def make_trace(*patterns, lengths=None):
    batch, _, n, _ = patterns[0].shape
    tokens = torch.arange(batch * n).view(batch, n)
    lengths = torch.full((batch,), n) if lengths is None else torch.tensor(lengths)
    return Trace(tokens, lengths, {block_site(i, PATTERN): p for i, p in enumerate(patterns)}, len(patterns))


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


def with_garbage(t, **changes):
    """The same trace with garbage in the rows (and tokens) of the padding."""
    values = {site: value.clone() for site, value in t.values.items()}
    padded = t.tokens.clone()
    for b, length in enumerate(t.lengths.tolist()):
        padded[b, length:] = 0
        for value in values.values():
            value[b, :, length:] = math.nan
    return dataclasses.replace(t, tokens=padded, values=values, **changes)


# ---- templates


def test_an_alibi_decoder_is_nearest_to_alibi():
    observed = trace(positional_decoder("alibi"), tokens(), [PATTERN])
    rows = compare_templates(observed, distances=list(DISTANCES), n_bootstrap=20)
    alibi = rows[rows["template"].isin(["alibi", "alibi_fitted"])]
    assert (alibi["value"] < 1e-5).all()
    assert alibi["slope"].to_numpy().reshape(2, 4, -1)[..., 0] == pytest.approx(
        np.array([[2.0 ** (-2 * k) for k in (1, 2, 3, 4)]] * 2), rel=1e-4
    )
    fixed = rows[~rows["template"].str.endswith("_fitted")]
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
    assert set(best["template"]) <= {"uniform", "alibi_fitted", "t5_fitted"}


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
    assert not rows.drop(columns="slope").isna().any(axis=None)
    for row in rows[rows["distance"] == "jensen_shannon"].itertuples():
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
        "layer", "head", "template", "distance", "value", "low", "high", "n", "n_parameters", "slope",
    ]  # fmt: skip
    assert not rows.duplicated(["layer", "head", "template", "distance"]).any()
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
    with pytest.raises(ProbeError, match=r"at least 2 sequences, .* got 1"):
        compare_templates(make_trace(random_pattern(1, 2, 6)))
    with pytest.raises(ProbeError, match=r"layer 1: a pattern wants rows that sum to 1 .* row 0 sums to 2"):
        compare_templates(make_trace(random_pattern(2, 2, 6), 2 * random_pattern(2, 2, 6)))
    with pytest.raises(ProbeError, match=r"the trace holds no 'blocks\.0\.attn\.hook_pattern'"):
        compare_templates(dataclasses.replace(make_trace(random_pattern(2, 2, 6)), values={}))


# ---- models


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
    ]  # fmt: skip
    assert len(rows) == 3 * (2 + 1) and (rows["n"] == 5).all()
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


# ---- bootstrap


def test_bootstrap_covers_the_mean_of_a_normal_sample():
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    bootstrap = Bootstrap.draw(40, 4000, 0.95, 0)
    low, high = bootstrap.interval(bootstrap.means(values))
    half = 1.96 * values.std(0, correction=0) / math.sqrt(40)
    torch.testing.assert_close(low, values.mean(0) - half, atol=0.03, rtol=0)
    torch.testing.assert_close(high, values.mean(0) + half, atol=0.03, rtol=0)


@pytest.mark.parametrize("confidence, low, high", [(0.85, 1, 19), (0.89, 1, 19), (0.91, 0, 20), (0.1, 9, 11)])
def test_interval_of_literal_draws_is_rounded_outward(confidence, low, high):
    draws = torch.arange(21.0, dtype=torch.float64)[torch.randperm(21, generator=torch.Generator().manual_seed(0))]
    got = Bootstrap(torch.ones(1, 1, dtype=torch.float64), confidence).interval(draws)
    assert (got[0].item(), got[1].item()) == (low, high)


def test_bootstrap_draws_are_whole_numbers_of_sequences():
    bootstrap = Bootstrap.draw(7, 30, 0.9, 3)
    counts = bootstrap.weights * 7
    torch.testing.assert_close(counts, counts.round())
    torch.testing.assert_close(bootstrap.weights.sum(1), torch.ones(30, dtype=torch.float64))


def test_bootstrap_with_one_infinite_sequence():
    values = torch.tensor([1.0, 2.0, math.inf], dtype=torch.float64)
    bootstrap = Bootstrap.draw(3, 500, 0.95, 0)
    means = bootstrap.means(values)
    assert torch.equal(means.isinf(), bootstrap.weights[:, 2] > 0) and not means.isnan().any()
    low, high = bootstrap.interval(means)
    assert 1 <= float(low) <= 2 and float(high) == math.inf
