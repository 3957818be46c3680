import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import peak_bytes

from probe.attention import split_long_context, split_scores, split_sums
from probe.attention.score_split.sums import ScoreSums
from probe.errors import ProbeError
from probe.models.encodings import alibi_slopes, t5_bucket
from probe.statistics import Bootstrap
from probe.tracing import SCORES, Trace, block_site, trace


def scores_trace(*layers, lengths=None, tokens=None):
    batch, _, n, _ = layers[0].shape
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    values = {block_site(i, SCORES): s.masked_fill(future, -math.inf) for i, s in enumerate(layers)}
    lengths = torch.full((batch,), n) if lengths is None else torch.tensor(lengths)
    tokens = torch.zeros(batch, n, dtype=torch.long) if tokens is None else tokens
    return Trace(tokens, lengths, values, len(layers))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_distance(f_rel):
    n = f_rel.shape[-1]
    return f_rel[..., (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0)]


def parts(n=12, seed=0):
    """Parts that satisfy the conventions already: means of 0 over cells, no slope in f_abs over the keys 1…n-1."""
    generator = np.random.default_rng(seed)
    key, query, distance = generator.normal(size=(3, n))
    seen = np.arange(n, 0, -1)
    slope, _ = np.polyfit(np.arange(1, n), key[1:], 1, w=np.sqrt(seen[1:]))
    key = key - slope * np.arange(n)
    return (
        key - np.average(key, weights=seen),
        query - np.average(query, weights=np.arange(1, n + 1)),
        distance - np.average(distance, weights=seen),
    )


def curve(split, name, head=0, layer=0):
    c = split.curves
    return (
        c[(c["curve"] == name) & (c["head"] == head) & (c["layer"] == layer)].sort_values("index")["value"].to_numpy()
    )


def share(split, scope, part, metric="share", head=0, layer=0):
    wanted = "scope == @scope and part == @part and metric == @metric and head == @head and layer == @layer"
    row = split.rows.query(wanted)
    assert len(row) == 1
    return row.iloc[0]


def cells_and_columns(scores, lengths, pairs=None):
    """Every cell of every sequence as a row of a design matrix, written out: the oracle's own way."""
    n = scores.shape[-1]
    y, rows = [], []
    for b, length in enumerate(lengths):
        for t in range(length):
            for i in range(t + 1):
                y.append(scores[b, t, i])
                rows.append((i, t, t - i, 0 if pairs is None else pairs[b, t, i]))
    rows = np.array(rows)
    blocks = {name: np.eye(n)[rows[:, j]] for j, name in enumerate(("key", "query", "distance"))}
    if pairs is not None:
        blocks["content"] = np.eye(pairs.max() + 1)[rows[:, 3]]
    return np.array(y, dtype=float), blocks


def within_rows(y, blocks, lengths):
    """Cells and columns less their mean over the row, in its sequence, that they stand in."""
    row = np.repeat(np.arange(sum(lengths)), [t + 1 for length in lengths for t in range(length)])
    mean = np.eye(row.max() + 1)[row]
    mean = mean / mean.sum(0)

    def centred(x):
        return x - (mean.T @ x)[row]

    return centred(y), {name: centred(X) for name, X in blocks.items() if name != "query"}


def unexplained(y, blocks, subset, cells=None):
    """``cells`` are the columns as they were before rows were centred, which say how many cells each key has."""
    cells_of = blocks if cells is None else cells
    X = [np.ones((len(y), 1)), *(blocks[p] for p in subset)]
    if "key" in subset and "distance" not in subset:
        # f_abs has no slope over the keys 1…n-1: all combinations of its columns that are orthogonal to that line.
        E = blocks["key"]
        cells, x = cells_of["key"].sum(0), np.arange(E.shape[1], dtype=float)
        line = np.where(x > 0, cells * (x - np.average(x[1:], weights=cells[1:])), 0)
        X[1 + list(subset).index("key")] = E @ (np.eye(len(x)) - np.outer(line, line) / (line @ line))
    X = np.hstack(X)
    return float(np.square(y - X @ np.linalg.lstsq(X, y, rcond=1e-10)[0]).sum())


def averaged_over_orders(left, names, always=()):
    """Lindeman, Merenda & Gold by going through all orders."""
    total = dict.fromkeys(names, 0.0)
    orders = list(itertools.permutations(names))
    for order in orders:
        for j, name in enumerate(order):
            before = frozenset([*order[:j], *always])
            total[name] += left[before] - left[before | {name}]
    return {name: value / len(orders) / left[frozenset(always)] for name, value in total.items()}


# ---- the parts


def test_parts_are_returned_as_they_were_put_in():
    key, query, distance = parts()
    scores = 0.7 + key[None, :] + query[:, None] + by_distance(torch.tensor(distance)).numpy()
    split = split_scores(scores_trace(torch.tensor(scores)[None, None]))
    for name, wanted in (("f_abs", key), ("g", query), ("f_rel", distance)):
        np.testing.assert_allclose(curve(split, name), wanted, atol=1e-10)
    assert share(split, "all", "residual").value == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("content", ["none", "pair"])
@pytest.mark.parametrize("encoding", ["alibi", "t5"])
def test_the_first_layer_of_a_model_with_a_bias_gives_its_slopes_and_buckets(encoding, content, make_decoder):
    """Content and bias: exact with a value a pair of tokens, and with content whose mean over sequences is nil."""
    decoder = make_decoder(encoding=encoding)
    if encoding == "t5":
        torch.nn.init.normal_(decoder.encoding.weight, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(1, 19, (40, 32), generator=torch.Generator().manual_seed(2))
    tokens[:, 0] = 0  # a <bos>, which stands at position 0 only
    traced = trace(decoder, tokens, [SCORES])
    if content == "none":  # each sequence beside its content turned round: q·k -> -q·k
        bias = decoder.encoding.bias(torch.arange(32), torch.arange(32), torch.zeros(1, dtype=torch.float64)).detach()
        both = [torch.cat((traced.scores(i).double(), 2 * bias - traced.scores(i).double())) for i in range(2)]
        traced = scores_trace(*(s.tril() for s in both), tokens=tokens.repeat(2, 1))
    split = split_scores(traced, content, layers=[0], n_bootstrap=20)
    if encoding == "alibi":
        slopes = [share(split, "seen", "distance", "slope", head=h).value for h in range(4)]
        np.testing.assert_allclose(slopes, alibi_slopes(4), atol=1e-4)
        assert share(split, "seen", "distance", "alibi_r2", head=0).value == pytest.approx(1, abs=1e-6)
    else:
        for head in range(4):
            found = curve(split, "t5_bucket", head)
            difference = found - decoder.encoding.weight[: len(found), head].detach().numpy()
            assert np.ptp(difference) < 1e-4
            assert share(split, "seen", "distance", "t5_r2", head=head).value == pytest.approx(1, abs=1e-6)
    if content == "pair":
        assert share(split, "all", "residual").value < 1e-10
        assert share(split, "all", "content").value > 0.1


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 9), st.integers(0, 99), st.floats(-2, 2))
def test_the_linear_trend_belongs_to_f_rel(n, seed, slope):
    """a·i on the keys is -a (t - i) by distance and a·t by query."""
    scores = normal(2, 1, n, n, seed=seed)
    plain = split_scores(scores_trace(scores), n_bootstrap=2)
    tilted = split_scores(scores_trace(scores + slope * torch.arange(n, dtype=torch.float64)), n_bootstrap=2)
    np.testing.assert_allclose(curve(tilted, "f_abs"), curve(plain, "f_abs"), atol=1e-8)
    moved = share(tilted, "seen", "distance", "slope").value - share(plain, "seen", "distance", "slope").value
    assert moved == pytest.approx(slope, abs=1e-8)
    for scope in ("all", "seen"):
        found = tilted.rows[(tilted.rows["scope"] == scope) & (tilted.rows["metric"] == "share")]["value"]
        assert found.sum() == pytest.approx(1) and (found > -1e-9).all()


def test_a_sink_does_not_tilt_f_rel():
    scores = torch.zeros(1, 1, 10, 10, dtype=torch.float64)
    scores[..., 0] = 5.0
    split = split_scores(scores_trace(scores))
    assert np.ptp(curve(split, "f_rel")) < 1e-9
    assert curve(split, "f_abs")[0] - curve(split, "f_abs")[1] == pytest.approx(5)
    assert share(split, "seen", "key").value > 0.8  # f_rel alone could imitate a part of it
    assert share(split, "seen", "residual").value == pytest.approx(0, abs=1e-12)


def test_a_head_with_equal_scores_has_no_shares_and_the_others_have_theirs():
    scores = normal(5, 3, 6, 6)
    scores[:, 1] = 2.5
    together = split_scores(scores_trace(scores), n_bootstrap=10).rows
    alone = split_scores(scores_trace(scores[:, [0, 2]]), n_bootstrap=10).rows
    assert together[together["head"] == 1][["value", "low", "high"]].isna().all(axis=None)
    for head, of in ((0, 0), (2, 1)):
        np.testing.assert_allclose(
            together.loc[together["head"] == head, "value"], alone.loc[alone["head"] == of, "value"], rtol=1e-9
        )


# ---- the shares, against design matrices written out


@pytest.mark.parametrize("with_pairs", [False, True])
def test_shares_are_those_of_explicit_least_squares(with_pairs):
    lengths = [5, 7, 7, 4, 6, 7, 5, 7]
    tokens = torch.randint(3, (8, 7), generator=torch.Generator().manual_seed(3))
    scores = normal(8, 2, 7, 7) + by_distance(torch.linspace(1, -1, 7, dtype=torch.float64)) + normal(7, seed=4)
    scores = scores + normal(3, 3, seed=5)[tokens[:, :, None], tokens[:, None, :]][:, None]
    split = split_scores(scores_trace(scores, lengths=lengths, tokens=tokens), "pair" if with_pairs else "none")
    pairs = (3 * tokens[:, :, None] + tokens[:, None, :]).numpy() if with_pairs else None
    for head in range(2):
        y, blocks = cells_and_columns(scores[:, head].numpy(), lengths, pairs)
        subsets = [s for r in range(len(blocks) + 1) for s in itertools.combinations(blocks, r)]
        left = {frozenset(s): unexplained(y, blocks, s) for s in subsets}
        whole = averaged_over_orders(left, list(blocks))
        centred, columns = within_rows(y, blocks, lengths)
        subsets = [s for r in range(len(columns) + 1) for s in itertools.combinations(columns, r)]
        left = {frozenset(s): unexplained(centred, columns, s, blocks) for s in subsets}
        seen = averaged_over_orders(left, list(columns))
        for scope, wanted in (("all", whole), ("seen", seen)):
            for part, value in wanted.items():
                assert share(split, scope, part, head=head).value == pytest.approx(value, abs=1e-9)
        toeplitz = 1 - left[frozenset(["distance"])] / left[frozenset()]
        assert share(split, "seen", "distance", "toeplitz_r2", head=head).value == pytest.approx(toeplitz, abs=1e-9)


@pytest.mark.parametrize("content", ["none", "pair"])
@pytest.mark.parametrize("window", [None, 4])
def test_what_softmax_does_not_see_changes_nothing_that_is_seen(content, window):
    """A constant of its own in each row of each sequence: the patterns are the same, and so is all that is said of
    rows, with its intervals. Of one exact bias by distance nothing else is left."""
    tokens = torch.randint(3, (9, 8), generator=torch.Generator().manual_seed(3))
    scores = normal(9, 2, 8, 8) + by_distance(torch.linspace(1, -1, 8, dtype=torch.float64))
    if window is not None:
        far = torch.arange(8)[:, None] - torch.arange(8) >= window
        scores = scores.masked_fill(far, -math.inf)
    plain, moved = (
        split_scores(scores_trace(s, tokens=tokens), content, n_bootstrap=30)
        for s in (scores, scores + 5 * normal(9, 2, 8, 1, seed=8))
    )
    for a, b in (
        (plain.rows[plain.rows["scope"] == "seen"], moved.rows[moved.rows["scope"] == "seen"]),
        (plain.curves[plain.curves["curve"] != "g"], moved.curves[moved.curves["curve"] != "g"]),
    ):
        pd.testing.assert_frame_equal(a, b, check_exact=False, rtol=1e-8, atol=1e-8)
    assert not np.allclose(
        plain.rows[plain.rows["scope"] == "all"]["value"], moved.rows[moved.rows["scope"] == "all"]["value"]
    )
    exact = by_distance(torch.linspace(1, -1, 8, dtype=torch.float64)).expand(9, 1, 8, 8) + normal(9, 1, 8, 1, seed=9)
    split = split_scores(scores_trace(exact, tokens=tokens), content, n_bootstrap=2)
    assert share(split, "seen", "distance", "toeplitz_r2").value == pytest.approx(1, abs=1e-9)
    assert share(split, "all", "residual").value > 0.1 or content == "pair"


def test_toeplitz_r2_of_the_mean_scores():
    _, query, distance = parts(8)
    scores = torch.tensor(query[:, None] + by_distance(torch.tensor(distance)).numpy())[None, None]
    noise = normal(1, 1, 8, 8)
    split = split_scores(scores_trace(torch.cat((scores + noise, scores - noise))), n_bootstrap=5)
    assert share(split, "mean", "distance", "toeplitz_r2").value == pytest.approx(1)
    assert share(split, "seen", "distance", "toeplitz_r2").value < 0.9


def test_padding_is_not_read():
    scores = normal(4, 1, 6, 6)
    plain = split_scores(scores_trace(scores, lengths=[4, 6, 3, 5]), n_bootstrap=20)
    for b, length in enumerate([4, 6, 3, 5]):
        scores[b, :, length:] = math.nan
    again = split_scores(scores_trace(scores, lengths=[4, 6, 3, 5]), n_bootstrap=20)
    pd.testing.assert_frame_equal(plain.rows, again.rows)
    pd.testing.assert_frame_equal(plain.curves, again.curves)


# ---- intervals


def test_intervals_of_curves_are_those_of_splits_made_anew():
    """With equal lengths the split is linear in the scores: the bootstrap may as well split every draw."""
    scores = normal(12, 1, 6, 6) + by_distance(torch.linspace(2, 0, 6, dtype=torch.float64))
    split = split_scores(scores_trace(scores), n_bootstrap=60, seed=7)
    drawn = torch.randint(12, (60, 12), generator=torch.Generator().manual_seed(7))
    tokens = torch.arange(12 * 6).view(12, 6)  # a draw's repeated sequences are to count as often as they were drawn

    def split_of(draw):
        return split_scores(scores_trace(scores[draw], tokens=tokens), n_bootstrap=1)

    anew = np.array([curve(split_of(draw), "f_rel") for draw in drawn])
    rows = split.curves[split.curves["curve"] == "f_rel"].sort_values("index")
    for j, row in enumerate(rows.itertuples()):
        ordered = np.sort(anew[:, j])
        assert (row.low, row.high) == pytest.approx((ordered[0], ordered[59]), abs=1e-9)


def test_intervals_of_shares_hold_the_truth_and_narrow():
    distance = torch.linspace(2, -2, 10, dtype=torch.float64)
    widths = []
    for n in (10, 160):
        split = split_scores(scores_trace(normal(n, 1, 10, 10, seed=n) + by_distance(distance)))
        row = share(split, "seen", "distance", "toeplitz_r2")
        assert row.low < row.value < row.high
        widths.append(row.high - row.low)
    assert widths[1] < widths[0] / 2


# ---- from queries and keys


def of_queries_and_keys(*inputs, draws=None):
    return split_sums({0: ScoreSums.together([ScoreSums.of_queries_and_keys(*each) for each in inputs])}, draws)


def assert_same(dense, streamed, atol=1e-9):
    for a, b in ((dense.rows, streamed.rows), (dense.curves, streamed.curves)):
        keys = [c for c in a.columns if c not in ("value", "low", "high")]
        both = b.merge(a, on=keys, how="left", validate="1:1")
        for column in ("value", "low", "high"):
            np.testing.assert_allclose(both[f"{column}_x"], both[f"{column}_y"], atol=atol)


@pytest.mark.parametrize("n", [2, 7, 300])
@pytest.mark.parametrize("with_bias", [False, True])
def test_queries_and_keys_give_what_their_scores_give(n, with_bias):
    bias = -alibi_slopes(4)[:, None] * torch.arange(n + 3) if with_bias else None
    inputs = [(normal(4, n, 8, seed=2 * b), normal(2, n, 8, seed=2 * b + 1), 0.3, bias) for b in range(3)]
    scores = torch.stack([0.3 * q @ k.repeat_interleave(2, dim=0).mT for q, k, *_ in inputs])
    if with_bias:
        scores = scores + by_distance(bias[:, :n])
    assert_same(split_scores(scores_trace(scores[:1])), of_queries_and_keys(inputs[0]))
    draws = Bootstrap.draw(3, 50, 0.95, 0)
    assert_same(split_scores(scores_trace(scores), n_bootstrap=50), of_queries_and_keys(*inputs, draws=draws))


@pytest.mark.parametrize("encoding", ["none", "alibi", "t5", "rotary"])
def test_a_model_is_split_without_its_scores(encoding, make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding=encoding), random_tokens(5, 24)
    dense = split_scores(trace(decoder, tokens, [SCORES]))
    assert_same(dense, split_long_context(decoder, tokens), atol=1e-4)


@pytest.mark.slow
def test_a_split_of_32768_tokens_in_little_memory():
    script = """
import torch
from probe.attention import split_sums
from probe.attention.score_split.sums import ScoreSums
g = torch.Generator().manual_seed(0)
q, k = torch.randn(8, 32768, 64, generator=g), torch.randn(8, 32768, 64, generator=g)
slopes = 2.0 ** -torch.arange(1, 9)
split = split_sums({0: ScoreSums.of_queries_and_keys(q, k, 0.0, -slopes[:, None] * torch.arange(32768))})
found = split.rows[split.rows["metric"] == "slope"]["value"].to_numpy()
assert abs(found / slopes.numpy() - 1).max() < 1e-6, found
"""
    assert peak_bytes(script) < 1.5e9


# ---- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_scores(scores_trace(torch.ones(2, 1, 4, 4))), "must vary, but those of every head"),
        (lambda: split_scores(scores_trace(normal(2, 1, 1, 1))), "at least 2 tokens"),
        (lambda: split_scores(scores_trace(normal(2, 1, 4, 4) * math.nan)), "finite.*sequence 0, head 0, query 0"),
        (lambda: split_scores(scores_trace(normal(2, 1, 4, 4)), "tokens"), "unknown content 'tokens'"),
        (
            lambda: split_scores(scores_trace(normal(1, 1, 4, 4), tokens=torch.arange(4)[None]), "pair"),
            "at least 4 cells a pair",
        ),
        (lambda: of_queries_and_keys((normal(1, 1, 2), normal(1, 1, 2), 1.0)), "at least 2 tokens"),
        (lambda: of_queries_and_keys((normal(3, 5, 2), normal(2, 5, 2), 1.0)), "dividing"),
        (lambda: of_queries_and_keys((normal(1, 5, 2) * math.nan, normal(1, 5, 2), 1.0)), "finite"),
        (lambda: of_queries_and_keys((normal(1, 5, 2), normal(1, 5, 2), 1.0, normal(1, 4))), "5 distances"),
        (lambda: of_queries_and_keys((torch.zeros(1, 5, 2), normal(1, 5, 2), 1.0)), "must vary"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ProbeError, match=message):
        call()


def test_t5_buckets_are_means_over_cells():
    scores = normal(3, 1, 40, 40)
    split = split_scores(scores_trace(scores), n_bootstrap=1)
    f_rel, found = curve(split, "f_rel"), curve(split, "t5_bucket")
    bucket = t5_bucket(torch.arange(40)).numpy()
    for b in range(len(found)):
        inside = bucket == b
        assert found[b] == pytest.approx(np.average(f_rel[inside], weights=np.arange(40, 0, -1)[inside]))
