import itertools

import numpy as np
import pytest
import torch
from peak_memory import peak_bytes

from probe.attention import attention_maps, compare_long_context, compare_templates, pool, pooled_pattern
from probe.attention.pooling import bin_starts
from probe.errors import ProbeError
from probe.models.lens import to_bridge
from probe.report import plot_attention_maps, render_page
from probe.report.page import Section
from probe.tracing import PATTERN, trace

FAMILIES = ["uniform", "alibi_fitted", "power_law", "t5_fitted"]
SAME = ["layer", "head", "template"]


@pytest.mark.parametrize("encoding", ["none", "alibi", "t5", "rotary"])
def test_it_is_what_whole_patterns_give(encoding, make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding=encoding, n_ctx=64), random_tokens(6, 48)
    found = compare_long_context(decoder, tokens, bins=48)
    traced = trace(decoder, tokens, [PATTERN])
    both = found.rows.merge(compare_templates(traced, FAMILIES), on=SAME, validate="1:1")
    assert len(both) == len(found.rows) == 2 * 4 * 4
    for column in ("value", "low", "high", "n_parameters", "n"):
        np.testing.assert_allclose(both[f"{column}_x"], both[f"{column}_y"], atol=1e-6)
    np.testing.assert_allclose(both["explained_x"], both["explained_y"], atol=1e-4)
    maps = found.maps.merge(attention_maps(traced, FAMILIES), on=["layer", "head", "query", "key"], validate="1:1")
    assert len(maps) == 2 * 4 * 48 * 49 // 2
    np.testing.assert_allclose(maps["pattern_x"], maps["pattern_y"], atol=1e-6)
    np.testing.assert_allclose(maps["template_pattern_x"], maps["template_pattern_y"], atol=1e-4)


def test_a_bridge_gives_what_its_decoder_gives(make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding="alibi"), random_tokens(2, 20)
    ours, theirs = (compare_long_context(m, tokens, layers=[1]).rows for m in (decoder, to_bridge(decoder)))
    np.testing.assert_allclose(ours["value"], theirs["value"], atol=1e-6)
    assert set(ours["layer"]) == {1}


@pytest.mark.parametrize(("n", "bins"), [(10, 4), (12, 4), (7, 7), (5, 9)])
def test_pooled_masses_are_sums_over_keys_and_means_over_queries(n, bins):
    q, k = (torch.randn(2, n, 3, generator=torch.Generator().manual_seed(i)) for i in range(2))
    bias = torch.linspace(0, -2, n).expand(2, -1)
    at = torch.arange(n)
    distance = at[:, None] - at
    scores = 0.5 * q @ k.mT + bias[:, distance.clamp(min=0)]
    pattern = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
    starts = bin_starts(n, bins).tolist()
    edges = [*starts, n]
    wanted = [
        [[pattern[h, a:b, c:d].sum(-1).mean().item() for c, d in itertools.pairwise(edges)]
         for a, b in itertools.pairwise(edges)]
        for h in range(2)
    ]  # fmt: skip
    np.testing.assert_allclose(pool(pattern, bins), wanted, atol=1e-6)
    np.testing.assert_allclose(pooled_pattern(q, k, 0.5, bias, bins), wanted, atol=1e-6)
    np.testing.assert_allclose(np.sum(wanted, axis=-1), 1, atol=1e-6)


def test_long_maps_are_pooled_before_they_are_drawn(make_decoder, random_tokens):
    decoder = make_decoder(n_ctx=300, n_layers=1, encoding="alibi")
    traced = trace(decoder, random_tokens(2, 300), [PATTERN])
    assert len(attention_maps(traced, ["alibi"])) == 4 * 300 * 301 // 2
    maps = attention_maps(traced, ["alibi"], bins=128)
    assert len(maps) == 4 * 128 * 129 // 2
    assert maps["query"].max() == maps["key"].max() == bin_starts(300, 128)[-1]
    figure = plot_attention_maps(maps)
    assert figure.layout.xaxis10.title.text == "key (sums of 3 a cell)"
    # Eight long heads, three maps each.
    page = render_page("t", [], [Section("s", figures=[("c", figure), ("d", figure)])])
    assert len(page) < 5_000_000


@pytest.mark.slow
def test_templates_are_fitted_at_4096_tokens_without_a_square():
    script = """
import torch
from probe.attention import compare_long_context
from probe.models.decoder import Decoder, DecoderConfig
torch.set_num_threads(1)
config = DecoderConfig(d_vocab=13, n_ctx=8, n_layers=1, d_model=32, n_heads=8, d_head=16, encoding="alibi")
decoder = Decoder(config, seed=0).eval()
torch.nn.init.zeros_(decoder.layers[0].attention.q_proj.weight)
rows = compare_long_context(decoder, torch.tensor([[0], [1]]).repeat(1, 4096)).rows
assert rows[rows["template"] == "alibi_fitted"]["value"].max() < 1e-5
"""
    # Two dense patterns in float64 would be 2 GiB.
    assert peak_bytes(script) < 1.3e9


def test_too_little_is_one_clear_line(make_decoder, random_tokens):
    with pytest.raises(ProbeError, match="at least 2 distinct sequences of 2 tokens are needed.*got 1 of 9"):
        compare_long_context(make_decoder(), random_tokens(1, 9))
    with pytest.raises(ProbeError, match="got 3 of 1"):
        compare_long_context(make_decoder(), random_tokens(3, 1))
    with pytest.raises(ProbeError, match="bins must be at least 1"):
        compare_long_context(make_decoder(), random_tokens(3, 5), bins=0)
