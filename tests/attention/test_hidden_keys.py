"""Layers that hide more keys than the future's: every measurement counts the keys that are seen, and no others."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
import transformers

from probe.attention import (
    TEMPLATES,
    attention_summary,
    census,
    compare_long_context,
    compare_templates,
    split_long_context,
    split_scores,
    stream,
)
from probe.attention.nulls import shuffled
from probe.attention.streaming.statistics import stream_attention
from probe.attention.streaming.template import StreamTemplate
from probe.errors import ProbeError
from probe.models.hidden_keys import nearest_keys
from probe.models.lens.released import load_bridge
from probe.tracing import PATTERN, SCORES, Trace, block_site, trace

WINDOW, LENGTH = 8, 32
CHUNKED = torch.arange(24) % 7 + 1  # attention in chunks of 7: how many keys each query sees


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """A random Mistral of one layer that sees the 8 nearest keys, and one that sees 31 of 32."""
    found = {}
    for window in (WINDOW, LENGTH - 1):
        folder = tmp_path_factory.mktemp("mistral")
        torch.manual_seed(0)
        config = transformers.MistralConfig(
            vocab_size=19, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=window, max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
        transformers.MistralForCausalLM(config).save_pretrained(folder)
        found[window] = load_bridge(folder, torch.device("cpu"), None)
    return found


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 19, (6, LENGTH), generator=torch.Generator().manual_seed(1))


def windowed(window, n=LENGTH):
    return torch.arange(1, n + 1).clamp(max=window)


def scores_of(n_visible, batch=4, heads=2, seed=0):
    n = len(n_visible)
    scores = torch.randn(batch, heads, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores.masked_fill(~nearest_keys(n_visible), -math.inf)


def least_squares(scores, n_visible, columns):
    """The residual sum of squares of one head's scores by numpy, over the cells that are seen, with these columns of
    indicators ("row": one for each row of each sequence); the column of ones is always there."""
    b, t, i = np.nonzero(np.broadcast_to(nearest_keys(n_visible).numpy(), scores.shape))
    of = {"key": i, "query": t, "distance": t - i, "row": len(n_visible) * b + t}
    design = [np.ones((len(i), 1))] + [np.eye(of[name].max() + 1)[of[name]] for name in columns]
    y = scores[b, t, i]
    design = np.concatenate(design, axis=1)
    fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return float(((y - fitted) ** 2).sum())


@pytest.mark.parametrize("window", [WINDOW, LENGTH - 1])
def test_scores_behind_a_window_are_hidden_and_do_not_count(window, mistral, tokens):
    traced = trace(mistral[window], tokens, [SCORES, PATTERN])
    scores = traced.scores(0)
    assert torch.equal(scores > -math.inf, nearest_keys(windowed(window)).expand(scores.shape))
    torch.testing.assert_close(scores.softmax(-1), traced.pattern(0))
    assert traced.n_visible(0).tolist() == windowed(window).tolist()
    shares = split_scores(traced, n_bootstrap=20).rows
    for head in range(4):
        left = [
            least_squares(scores[:, head].double().numpy(), windowed(window), columns)
            for columns in ((), ("key", "query", "distance"), ("row",), ("row", "distance"))
        ]
        of = shares[shares["head"] == head].set_index(["scope", "part", "metric"])["value"]
        assert of["all", "residual", "share"] == pytest.approx(left[1] / left[0], abs=1e-9)
        assert of["seen", "distance", "toeplitz_r2"] == pytest.approx(1 - left[3] / left[2], abs=1e-9)


def test_scores_by_hand_hide_keys_as_a_bridge_does(mistral, tokens):
    """What a bridge's own hooks hand out has the lowest finite number at hidden keys: a trace made of it knows that."""
    raw = {}
    mistral[WINDOW].run_with_hooks(
        tokens, fwd_hooks=[(block_site(0, SCORES), lambda value, hook: raw.update({block_site(0, SCORES): value}))]
    )
    by_hand = Trace(tokens, torch.full((6,), LENGTH), {site: value.detach() for site, value in raw.items()}, 1)
    assert torch.equal(by_hand.scores(0), trace(mistral[WINDOW], tokens, [SCORES]).scores(0))
    assert by_hand.n_visible(0).tolist() == windowed(WINDOW).tolist()


def test_a_pattern_alone_knows_its_window(mistral, tokens):
    """A trace that holds patterns only has been told which keys were hidden: a weight of 0 may as well be rounding."""
    traced = trace(mistral[WINDOW], tokens, [PATTERN], batch_size=4)
    assert [*traced.values] == [block_site(0, PATTERN)] and traced.n_visible(0).tolist() == windowed(WINDOW).tolist()
    hidden = ~nearest_keys(windowed(WINDOW))
    for name in TEMPLATES:
        if not TEMPLATES[name].needs_t5_table:
            fitted = TEMPLATES[name](traced.pattern(0), n_visible=traced.n_visible(0)).pattern
            assert not fitted[:, hidden].any(), name
            torch.testing.assert_close(fitted.sum(-1), torch.ones(4, LENGTH, dtype=torch.float64)), name
    rows = compare_templates(traced, ["uniform"], nulls=False, n_bootstrap=20)
    uniform = nearest_keys(windowed(WINDOW)) / windowed(WINDOW)[:, None]
    p = traced.pattern(0)[3:].double()
    m = (p + uniform) / 2
    jsd = torch.special.entr(m).sum(-1) - (torch.special.entr(p) + torch.special.entr(uniform)).sum(-1) / 2
    assert rows["value"].to_numpy() == pytest.approx(jsd.mean((0, 2)).numpy(), abs=1e-6)


@pytest.mark.parametrize("n_visible", [windowed(5, 20), CHUNKED], ids=["window", "chunks"])
@pytest.mark.parametrize("name", ["alibi_fitted", "t5_fitted", "first_token_sink", "window", "sink_alibi"])
def test_fits_are_the_minima_over_the_keys_that_are_seen(name, n_visible):
    """No template of the family is nearer: scipy moves the bias of each distance, and the sink, and gains nothing."""
    pattern = scores_of(n_visible).softmax(-1)
    fitted = TEMPLATES[name](pattern, n_visible=n_visible)
    seen, mean = nearest_keys(n_visible), pattern.mean(0)
    n, sees_first = len(n_visible), (n_visible == torch.arange(1, len(n_visible) + 1))[:, None]
    distance = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0)

    def template(x):
        """A bias by distance (ALiBi's slope, a bias of each distance) and a sink on the first token."""
        weight = torch.sigmoid(torch.tensor(x[0])) if name == "sink_alibi" else torch.tensor(0.0)
        bias = {
            "alibi_fitted": lambda: -x[1] * distance,
            "sink_alibi": lambda: -x[1] * distance,
            "t5_fitted": lambda: torch.as_tensor(x[1:])[distance.clamp(max=int(n_visible.max()) - 1)],
            "first_token_sink": lambda: x[1] * (torch.arange(n) == 0).expand(n, n),
            "window": lambda: x[1] * (distance < fitted.parameters["width"][0]),
        }[name]()
        rows = torch.as_tensor(bias, dtype=torch.float64).masked_fill(~seen, -math.inf).softmax(-1)
        first = (torch.arange(n) == 0).double()
        return torch.where(sees_first, (1 - weight) * rows + weight * first, rows)

    def divergence(rows):
        return float((torch.special.xlogy(mean[0], mean[0]) - torch.special.xlogy(mean[0], rows))[seen].sum())

    size = 2 if name != "t5_fitted" else 1 + int(n_visible.max())
    starts = [np.zeros(size), np.r_[-3.0, np.full(size - 1, 0.3)]]
    best = min(scipy.optimize.minimize(lambda x: divergence(template(x)), x).fun for x in starts)
    assert divergence(fitted.pattern[0]) == pytest.approx(best, abs=1e-5)


def test_a_split_in_chunks_is_that_of_numpy():
    scores = scores_of(CHUNKED)
    tokens = torch.zeros(4, len(CHUNKED), dtype=torch.long)
    split = split_scores(Trace(tokens, torch.full((4,), 24), {block_site(0, SCORES): scores}, 1), n_bootstrap=20)
    shares = split.rows[split.rows["head"] == 1].set_index(["scope", "part", "metric"])["value"]
    subsets = ((), ("row",), ("row", "distance"), ("key", "query", "distance"))
    left = {subset: least_squares(scores[:, 1].numpy(), CHUNKED, subset) for subset in subsets}
    assert shares["all", "residual", "share"] == pytest.approx(left["key", "query", "distance"] / left[()], abs=1e-9)
    toeplitz = 1 - left["row", "distance"] / left[("row",)]
    assert shares["seen", "distance", "toeplitz_r2"] == pytest.approx(toeplitz, abs=1e-9)
    f_rel = split.curves[(split.curves["curve"] == "f_rel") & (split.curves["head"] == 1)]
    assert f_rel["index"].tolist() == list(range(7))  # no cell is further away


def test_long_contexts_are_split_over_the_window(mistral, tokens):
    """Straight from queries and keys, the same numbers as from the scores."""
    streamed = split_long_context(mistral[WINDOW], tokens, n_bootstrap=20, seed=3)
    dense = split_scores(trace(mistral[WINDOW], tokens, [SCORES]), n_bootstrap=20, seed=3)
    keys = ["layer", "head", "scope", "part", "metric"]
    both = streamed.rows.merge(dense.rows, on=keys)
    assert len(both) == len(streamed.rows)
    assert both["value_x"].to_numpy() == pytest.approx(both["value_y"].to_numpy(), abs=1e-5, nan_ok=True)
    both = streamed.curves.merge(dense.curves, on=["layer", "head", "curve", "index"])
    assert len(both) == len(dense.curves)
    assert both["value_x"].to_numpy() == pytest.approx(both["value_y"].to_numpy(), abs=1e-4)


@pytest.mark.parametrize("window", [1, 5, 20, 60])
def test_streaming_knows_the_window(window):
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(h, 40, 8, generator=generator, dtype=torch.float64) for h in (4, 2))
    bias = torch.randn(4, 40, generator=generator, dtype=torch.float64)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64)
    templates = {"alibi": StreamTemplate.alibi(slopes)}
    found = stream_attention(
        q, k, scale=0.35, bias=bias, window=window, templates=templates, histogram=True, jensen_shannon=True
    )
    seen, at = nearest_keys(windowed(window, 40)), torch.arange(40)
    away = (at[:, None] - at).clamp(min=0)
    scores = 0.35 * q @ k.repeat_interleave(2, 0).transpose(1, 2) + bias[:, away]
    p = scores.masked_fill(~seen, -math.inf).softmax(-1)
    t = (-slopes[:, None, None] * away).masked_fill(~seen, -math.inf).softmax(-1)
    close = {"atol": 1e-9, "rtol": 1e-9}
    torch.testing.assert_close(found.entropy, torch.special.entr(p).sum(-1), **close)
    torch.testing.assert_close(found.mean_distance, (p * away).sum(-1), **close)
    torch.testing.assert_close(found.first, p[..., 0], **close)
    torch.testing.assert_close(found.previous[:, 1:], p.diagonal(-1, dim1=-2, dim2=-1), **close)
    torch.testing.assert_close(found.self_, p.diagonal(dim1=-2, dim2=-1), **close)
    by_distance = torch.stack([p.diagonal(-d, dim1=-2, dim2=-1).sum(-1) for d in range(40)], dim=-1) / 40
    torch.testing.assert_close(found.histogram, by_distance, **close)
    kl = torch.where(seen, torch.special.xlogy(p, p) - torch.special.xlogy(p, t), 0.0).sum(-1)
    torch.testing.assert_close(found.divergence["alibi"].kl, kl, **close)
    m = (p + t) / 2
    jsd = torch.special.entr(m).sum(-1) - (torch.special.entr(p) + torch.special.entr(t)).sum(-1) / 2
    torch.testing.assert_close(found.divergence["alibi"].jensen_shannon, jsd, **close)


def test_long_contexts_are_compared_over_the_window(mistral, tokens):
    found = compare_long_context(mistral[WINDOW], tokens, n_bootstrap=20)
    dense = compare_templates(trace(mistral[WINDOW], tokens, [PATTERN]), ["uniform", "alibi_fitted", "t5_fitted"])
    both = found.rows.merge(dense, on=["layer", "head", "template"])
    assert len(both) == 12
    assert both["value_x"].to_numpy() == pytest.approx(both["value_y"].to_numpy(), abs=1e-5)
    hidden = found.maps[found.maps["query"] - found.maps["key"] >= WINDOW]
    assert len(hidden) and (hidden[["pattern", "template_pattern"]] == 0).all(axis=None)


def test_the_bound_of_entropy_is_that_of_the_keys_that_are_seen(mistral, tokens):
    rows = attention_summary(trace(mistral[WINDOW], tokens, [PATTERN]), n_bootstrap=20)
    assert rows.groupby("query")["n_visible"].unique().str[0].tolist() == windowed(WINDOW).tolist()
    streamed = stream(mistral[WINDOW], tokens).rows(n_bins=LENGTH)
    assert streamed.groupby("query")["n_visible"].first().tolist() == windowed(WINDOW).tolist()


def test_uniform_heads_of_a_window_are_uniform(mistral, tokens):
    """With W_Q = 0 every key that is seen has the same weight: the census says uniform, with a score of 1."""
    model = mistral[WINDOW]
    q = model.original_model.model.layers[0].self_attn.q_proj
    weight = next(iter(q.parameters()))
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.zero_()
        rows = census(model, tokens, ablate=False, n_bootstrap=20)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert set(rows["label"]) == {"uniform"}
    values = rows.set_index(["head", "metric"])["value"]
    assert values[:, "uniform"].to_numpy() == pytest.approx(1, abs=1e-6)
    # 1/n of the rows that see the first token, 2 … 8 keys.
    assert values[:, "sink"].to_numpy() == pytest.approx(np.mean([1 / n for n in range(2, WINDOW + 1)]), abs=1e-6)


def test_shuffled_rows_keep_to_the_keys_that_are_seen():
    pattern = scores_of(CHUNKED).softmax(-1)
    shuffle = shuffled(pattern, CHUNKED, np.random.default_rng(0))
    assert not shuffle[..., ~nearest_keys(CHUNKED)].any() and not torch.equal(shuffle, pattern)
    torch.testing.assert_close(shuffle.sort(-1).values, pattern.sort(-1).values)


def test_keys_that_are_hidden_otherwise_are_refused_in_one_line():
    scores = scores_of(windowed(24, 24))
    scores[:, :, 20, 3] = -math.inf
    traced = Trace(torch.zeros(4, 24, dtype=torch.long), torch.full((4,), 24), {block_site(0, SCORES): scores}, 1)
    with pytest.raises(
        ProbeError, match="layer 0 must show each query its own key and the nearest before it"
    ) as caught:
        split_scores(traced)
    assert "\n" not in str(caught.value)
