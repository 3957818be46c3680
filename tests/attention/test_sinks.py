"""Heads with a learned sink: it is one more key, and the oracle is the same head with that key written out."""

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from released import gpt_oss_with_sinks

import probe
from probe.attention import (
    attention_maps,
    attention_on,
    attention_summary,
    census,
    compare_models,
    compare_templates,
    pattern_distance,
    stream,
)
from probe.attention.head_pairs import head_pair_distances
from probe.errors import ProbeError
from probe.report import plot_attention_maps
from probe.tracing import Trace

N, LENGTH = 6, 9


def softmax_with_a_sink(seed, sink=1.0, n_heads=2):
    """Patterns over the tokens and, in front of them, the sink: "batch head query (1 + key)"."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(N, n_heads, LENGTH, LENGTH, generator=generator, dtype=torch.float64)
    scores = scores.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf)
    column = torch.full((N, n_heads, LENGTH, 1), sink, dtype=torch.float64)
    return torch.cat((column, scores), -1).softmax(-1)


def traced(whole):
    tokens = torch.arange(N)[:, None] + torch.arange(LENGTH)
    return Trace(tokens, torch.full((N,), LENGTH), {"blocks.0.attn.hook_pattern": whole[..., 1:]}, 1, sinks={0})


@pytest.fixture(scope="module")
def whole():
    return softmax_with_a_sink(0)


def test_a_traces_sink_mass_is_what_the_extra_key_has(whole):
    torch.testing.assert_close(traced(whole).sink_mass(0), whole[..., 0])
    eye = {"blocks.0.attn.hook_pattern": torch.eye(2)[None, None]}
    plain = Trace(torch.zeros(1, 2, dtype=torch.long), torch.tensor([2]), eye, 1)
    assert torch.equal(plain.sink_mass(0), torch.zeros(1, 1, 2, dtype=torch.float64))


@pytest.mark.parametrize("distance", ["jensen_shannon", "total_variation", "hellinger", "symmetric_kl"])
def test_a_distance_is_that_of_rows_with_the_key_written_out(distance, whole):
    other = softmax_with_a_sink(1, sink=-1.0)
    got = pattern_distance(whole[..., 1:], other[..., 1:], distance, sink=True)
    oracle = {
        "jensen_shannon": lambda p, q: scipy.spatial.distance.jensenshannon(p, q) ** 2,
        "total_variation": lambda p, q: np.abs(p - q).sum() / 2,
        "hellinger": lambda p, q: np.sqrt(((np.sqrt(p) - np.sqrt(q)) ** 2).sum() / 2),
        "symmetric_kl": lambda p, q: scipy.stats.entropy(p, q) + scipy.stats.entropy(q, p),
    }[distance]
    by_row = [
        [oracle(whole[b, h, t, : t + 2].numpy(), other[b, h, t, : t + 2].numpy()) for t in range(LENGTH)]
        for b in range(N)
        for h in range(2)
    ]
    np.testing.assert_allclose(got.flatten(), np.mean(by_row, axis=1), rtol=1e-9)
    pairs = head_pair_distances(whole[..., 1:], other[..., 1:], distance, sink=True)
    torch.testing.assert_close(pairs.diagonal(dim1=1, dim2=2), got)


def test_a_distance_along_positions_is_refused(whole):
    with pytest.raises(ProbeError, match="'wasserstein' needs a position for every key"):
        pattern_distance(whole[..., 1:], whole[..., 1:], "wasserstein", sink=True)


def test_entropy_distance_and_share_of_the_summary(whole):
    rows = attention_summary(traced(whole), n_bootstrap=1)
    table = rows.pivot_table(index=["head", "query"], columns="metric", values="value")
    entropy = scipy.stats.entropy(whole.numpy(), axis=-1).mean(0).flatten()
    np.testing.assert_allclose(table["entropy"], entropy, rtol=1e-9)
    np.testing.assert_allclose(table["learned_sink"], whole[..., 0].mean(0).flatten(), rtol=1e-9)
    np.testing.assert_allclose(table["first"], whole[..., 1].mean(0).flatten(), rtol=1e-9)
    away = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    on_tokens = whole[..., 1:] / whole[..., 1:].sum(-1, keepdim=True)
    np.testing.assert_allclose(table["mean_distance"], (on_tokens * away).sum(-1).mean(0).flatten(), rtol=1e-9)


def test_a_template_says_nothing_of_the_sink(whole):
    """A head that is uniform on its tokens and has the same sink share in all sequences is the uniform template."""
    uniform = torch.ones(LENGTH, LENGTH, dtype=torch.float64).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    share = torch.linspace(0.1, 0.8, LENGTH, dtype=torch.float64)[:, None]
    exact = traced(torch.cat((share, (1 - share) * uniform), -1).expand(N, 1, LENGTH, LENGTH + 1))
    rows = compare_templates(exact, ["uniform", "alibi_fitted"], n_bootstrap=1, nulls=False)
    assert rows["value"].abs().max() < 1e-9
    # Of other heads: fitted to what is on the tokens, measured with the key written out.
    rows = compare_templates(traced(whole), ["uniform"], n_bootstrap=1)
    half = N // 2
    mean = whole[:half, ..., 0].mean(0)[..., None]
    template = torch.cat((mean, (1 - mean) * uniform), -1)
    wanted = [
        np.mean(
            [
                scipy.spatial.distance.jensenshannon(whole[b, h, t, : t + 2], template[h, t, : t + 2]) ** 2
                for b in range(half, N)
                for t in range(LENGTH)
            ]
        )
        for h in range(2)
    ]
    np.testing.assert_allclose(rows["value"], wanted, rtol=1e-9)


def test_models_are_compared_with_their_sinks_or_not_at_all(whole):
    other = softmax_with_a_sink(1)
    rows = compare_models({"a": traced(whole), "b": traced(other)}, n_bootstrap=1)
    each = head_pair_distances(whole[..., 1:], other[..., 1:], sink=True).flatten(1)
    wanted = each[N // 2 :, each[: N // 2].mean(0).argmin()].mean()  # the nearest heads of the first half
    assert rows["value"].tolist() == pytest.approx([float(wanted)] * 2)
    without = Trace(traced(whole).tokens, traced(whole).lengths, {"blocks.0.attn.hook_pattern": whole[..., 1:]}, 1)
    with pytest.raises(ProbeError, match=r"'a' has learned sinks in layers \[0\] and 'b' in \[\]"):
        compare_models({"a": traced(whole), "b": without})
    with pytest.raises(ProbeError, match="rows that sum to 1"):
        compare_templates(without)


def test_a_map_names_the_sink(whole):
    rows = attention_maps(traced(whole), ["uniform"])
    sink = rows[rows["key"] == -1]
    np.testing.assert_allclose(sink["pattern"], whole[N // 2 :, ..., 0].mean(0).flatten(), rtol=1e-9)
    np.testing.assert_allclose(rows.groupby(["head", "query"])["pattern"].sum(), 1, rtol=1e-9)
    np.testing.assert_allclose(rows.groupby(["head", "query"])["template_pattern"].sum(), 1, rtol=1e-9)
    few = attention_maps(traced(whole), ["uniform"], bins=3)
    np.testing.assert_allclose(few.groupby(["head", "query"])["pattern"].sum(), 1, rtol=1e-9)
    figure = plot_attention_maps(rows)
    assert figure.data[0].x[0] == -1 and figure.layout.xaxis.ticktext[0] == "sink"
    assert figure.data[0].customdata[1][0] == "query 1, key sink" and figure.data[0].z.shape == (LENGTH, LENGTH + 1)
    labelled = plot_attention_maps(rows, labels=[f"w{i}" for i in range(LENGTH)])
    assert labelled.layout.xaxis.ticktext[:2] == ("sink", "w0")


@pytest.fixture(scope="module")
def gpt_oss():
    """A tiny model whose second layer's heads give their sinks almost everything."""
    model = gpt_oss_with_sinks()
    with torch.no_grad():
        model.model.layers[0].self_attn.sinks.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
        model.model.layers[1].self_attn.sinks.fill_(20.0)
    return model


def test_a_model_with_sinks_is_measured(gpt_oss):
    model = probe.wrap(gpt_oss)
    tokens = torch.randint(0, 19, (8, 16), generator=torch.Generator().manual_seed(0))
    found = probe.trace(model, tokens, ["attn.hook_pattern", "attn.hook_attn_scores"])
    assert found.sinks == {0, 1}
    for layer in (0, 1):
        sink = gpt_oss.model.layers[layer].self_attn.sinks.detach()[:, None, None].expand(8, 4, 16, 1)
        with_key = torch.cat((sink, found.scores(layer)), -1).softmax(-1)  # the same head with the key written out
        torch.testing.assert_close(found.pattern(layer), with_key[..., 1:])
        torch.testing.assert_close(found.sink_mass(layer).float(), with_key[..., 0], atol=1e-5, rtol=1e-4)
    rows = census(model, tokens, n_bootstrap=20)
    assert set(rows.loc[rows["layer"] == 1, "label"]) == {"learned_sink"}
    share = rows[(rows["layer"] == 1) & (rows["metric"] == "learned_sink")]["value"]
    assert (share > 0.5).all() and rows["value"].notna().all()
    queries = torch.zeros(8, 16, dtype=torch.bool)
    queries[:, 10:] = True
    on = attention_on(model, tokens, torch.arange(16).expand(8, 16) == 4, queries, n_bootstrap=1)
    parts = on[on["metric"].isin(["on_keys", "on_first", "on_recent", "on_sink", "elsewhere"])]
    np.testing.assert_allclose(parts.groupby(["layer", "head"])["value"].sum(), 1, rtol=1e-5)
    with pytest.raises(ProbeError, match="layer 0 has a learned sink"):
        stream(model, tokens)
