import math

import numpy as np
import pytest
import torch
from scipy import stats

from probe.attention import attention_summary, stream
from probe.errors import ProbeError
from probe.tracing import Trace, trace

PATTERN = "blocks.0.attn.hook_pattern"


def one_layer(pattern, lengths=None):
    batch, _, n, _ = pattern.shape
    lengths = torch.full((batch,), n) if lengths is None else torch.tensor(lengths)
    return Trace(torch.zeros(batch, n, dtype=torch.long), lengths, {PATTERN: pattern}, n_layers=1)


def random_patterns(batch, n):
    scores = torch.randn(batch, 2, n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf).softmax(-1)


def test_literal_pattern():
    pattern = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.25, 0.75, 0]], dtype=torch.float64)[None, None]
    rows = attention_summary(one_layer(pattern), n_bootstrap=5)
    assert list(rows.columns) == ["layer", "head", "query", "metric", "value", "low", "high", "n", "n_visible"]
    assert rows["n_visible"].tolist() == 5 * [1, 2, 3]
    found = {metric: part["value"].tolist() for metric, part in rows.groupby("metric")}
    quarter = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert found["entropy"] == pytest.approx([0, math.log(2), quarter], abs=1e-15)
    assert found["mean_distance"] == [0, 0.5, 1.25]
    assert found["first"] == [1, 0.5, 0.25]
    assert found["previous"] == [0, 0.5, 0.75]
    assert found["self"] == [1, 0.5, 0]
    assert rows["low"].isna().all() and rows["high"].isna().all()  # one sequence has no interval


def test_every_row_is_the_mean_of_the_sequences_that_reach_it():
    pattern, lengths = random_patterns(5, 9), [9, 4, 4, 1, 9]
    spoiled = pattern.clone()
    for sequence, length in enumerate(lengths):
        spoiled[sequence, :, length:] = math.nan
    rows = attention_summary(one_layer(spoiled, lengths), n_bootstrap=50).set_index(["metric", "head", "query"])
    assert len(rows) == 5 * 2 * 9
    for query in range(9):
        reached = [s for s in range(5) if lengths[s] > query]
        for head in range(2):
            p = pattern[reached, head, query, : query + 1].numpy()
            wanted = {
                "entropy": stats.entropy(p, axis=1).mean(),
                "mean_distance": (p @ np.arange(query, -1, -1)).mean(),
                "first": p[:, 0].mean(),
                "previous": p[:, -2].mean() if query else 0,
                "self": p[:, -1].mean(),
            }
            for metric, value in wanted.items():
                row = rows.loc[metric, head, query]
                assert row["value"] == pytest.approx(value, abs=1e-12)
                assert row["n"] == len(reached)
                assert row["low"] <= row["value"] + 1e-12 and row["high"] >= row["value"] - 1e-12


def test_the_interval_is_scipys():
    pattern = random_patterns(40, 6)
    rows = attention_summary(one_layer(pattern), n_bootstrap=4000).set_index(["metric", "head", "query"])
    values = pattern[:, 1, 5, 0].numpy()
    scipys = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    row = rows.loc["first", 1, 5]
    assert row["low"] == pytest.approx(scipys.low, abs=0.01)
    assert row["high"] == pytest.approx(scipys.high, abs=0.01)


def test_it_is_what_streaming_finds(make_decoder, random_tokens):
    decoder, tokens, lengths = make_decoder(encoding="alibi"), random_tokens(batch=4), torch.tensor([16, 3, 9, 16])
    dense = attention_summary(trace(decoder, tokens, lengths=lengths), n_bootstrap=1)
    streamed = stream(decoder, tokens, lengths=lengths).rows()
    keys = ["layer", "head", "query", "metric"]
    both = dense.merge(streamed, on=keys, suffixes=("", "_streamed"))
    assert len(both) == len(dense) == len(streamed)
    np.testing.assert_allclose(both["value"], both["value_streamed"], atol=1e-4)
    assert (both["n"] == both["n_streamed"]).all()


def test_bad_input_is_one_clear_line():
    with pytest.raises(ProbeError, match="layer 0: a pattern wants rows that sum to 1"):
        attention_summary(one_layer(random_patterns(2, 4) / 2))
    with pytest.raises(ProbeError, match="n_bootstrap must be at least 1, got 0"):
        attention_summary(one_layer(random_patterns(2, 4)), n_bootstrap=0)
