import pandas as pd
import pytest
import torch

from probe.attention import attention_on, by_layer_encoding, census
from probe.errors import ProbeError
from probe.models.lens import to_bridge
from probe.position import probe_positions
from probe.tracing import trace

QUICK = {"n_bootstrap": 50}


@pytest.fixture
def hybrid(make_decoder):
    return make_decoder(encoding="rotary", n_layers=4, position_layers=(0, 2))


def needle(tokens):
    """The three keys from 4 on, looked for by the last two queries."""
    keys, queries = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
    keys[:, 4:7], queries[:, -2:] = True, True
    return keys, queries


def test_rows_name_what_their_layer_sees(hybrid, random_tokens):
    tokens = random_tokens(batch=12)
    heads = census(hybrid, tokens, ablate=False, **QUICK).drop_duplicates("layer").set_index("layer")
    assert heads["layer_encoding"].to_dict() == {0: "rotary", 1: "none", 2: "rotary", 3: "none"}
    rows = probe_positions(hybrid, tokens, ["hook_embed", "hook_resid_post"], controls=(), **QUICK)
    seen = rows.drop_duplicates("site").set_index("site")["layer_encoding"]
    assert pd.isna(seen["hook_embed"])
    assert seen["blocks.1.hook_resid_post"] == "none" and seen["blocks.2.hook_resid_post"] == "rotary"


def test_attention_on_is_the_sum_of_the_pattern_there(hybrid, random_tokens):
    tokens = random_tokens(batch=6, length=24)
    keys, queries = needle(tokens)
    rows = attention_on(hybrid, tokens, keys, queries, window=5, **QUICK)
    assert set(rows["layer_encoding"]) == {"rotary", "none"}
    pattern = trace(hybrid, tokens, ["attn.hook_pattern"]).pattern(2)[:, 1, -2:].double()
    value = rows[(rows["layer"] == 2) & (rows["head"] == 1)].set_index("metric")["value"]
    assert value["on_keys"] == pytest.approx(float(pattern[..., 4:7].sum(-1).mean()))
    assert value["on_first"] == pytest.approx(float(pattern[..., 0].mean()))
    recent = pattern[:, 0, 18:23].sum(-1) + pattern[:, 1, 19:24].sum(-1)
    assert value["on_recent"] == pytest.approx(float(recent.mean()) / 2)
    parts = ["on_keys", "on_first", "on_recent", "elsewhere"]
    assert value[parts].sum() == pytest.approx(1)
    assert value["on_keys_uniform"] == pytest.approx((3 / 23 + 3 / 24) / 2)
    distance = torch.tensor([22.0, 23.0])[:, None] - torch.arange(24)
    reach = (pattern * distance).sum(-1) / torch.tensor([11.0, 11.5])
    assert value["reach"] == pytest.approx(float(reach.mean()))
    assert ((rows["low"] <= rows["value"] + 1e-12) & (rows["value"] <= rows["high"] + 1e-12)).all()


def test_uniform_attention_reaches_one_and_has_its_share(make_decoder, random_tokens):
    tokens = random_tokens(batch=4, length=20)
    decoder = make_decoder()
    with torch.no_grad():
        for block in decoder.layers:
            block.attention.q_proj.weight.zero_()
            block.attention.q_proj.bias.zero_()
    wide = attention_on(decoder, tokens, *needle(tokens), **QUICK).pivot_table(
        index="head", columns="metric", values="value"
    )
    assert wide["reach"].to_numpy() == pytest.approx(1)
    assert wide["on_keys"].to_numpy() == pytest.approx(wide["on_keys_uniform"].to_numpy())


def test_a_bridge_and_padding_change_nothing(hybrid, random_tokens):
    tokens = random_tokens(batch=6)
    keys, queries = needle(tokens)
    plain = attention_on(hybrid, tokens, keys, queries, **QUICK)
    bridged = attention_on(to_bridge(hybrid), tokens, keys, queries, **QUICK)
    pd.testing.assert_frame_equal(plain, bridged, atol=1e-5)
    padded = [torch.nn.functional.pad(x, (0, 3), value=True) for x in (tokens, keys, queries)]
    longer = attention_on(hybrid, *padded, lengths=torch.full((6,), 16), **QUICK)
    pd.testing.assert_frame_equal(plain, longer, atol=1e-6)


def test_means_by_kind_are_those_of_pandas_and_differences_have_intervals(hybrid, random_tokens):
    rows = census(hybrid, random_tokens(batch=12), ablate=False, **QUICK)
    split = by_layer_encoding(rows, ["induction", "sink"])
    means = rows.groupby(["layer_encoding", "metric"])["value"].mean()
    value = split.set_index(["layer_encoding", "metric"])["value"]
    for metric in ("induction", "sink"):
        assert value["none", metric] == pytest.approx(means["none", metric])
        assert value["none - rotary", metric] == pytest.approx(means["none", metric] - means["rotary", metric])
    assert split["n"].tolist() == [8, 8, 8] * 2
    assert ((split["low"] < split["value"]) & (split["value"] < split["high"])).all()
    whole = by_layer_encoding(rows[rows["layer_encoding"] == "none"])
    assert set(whole["layer_encoding"]) == {"none"}


def test_a_planted_difference_is_found_and_none_where_there_is_none():
    heads = torch.Generator().manual_seed(0)

    def of(shift):
        return pd.DataFrame(
            [
                {"layer": layer, "head": head, "layer_encoding": ("rotary", "none")[layer % 2], "metric": "m"}
                | {"value": float(torch.randn((), generator=heads)) + shift * (layer % 2)}
                for layer in range(6)
                for head in range(8)
            ]
        )

    planted = by_layer_encoding(of(2.0)).set_index("layer_encoding").loc["none - rotary"]
    assert planted["low"] > 1 and planted["high"] < 3
    none = by_layer_encoding(of(0.0)).set_index("layer_encoding").loc["none - rotary"]
    assert none["low"] < 0 < none["high"]


def test_bad_input_is_one_clear_line(hybrid, random_tokens):
    tokens = random_tokens(batch=3)
    keys, queries = needle(tokens)
    with pytest.raises(ProbeError, match=r"keys must be booleans of the tokens' shape \(3, 16\), got .*\(3, 15\)"):
        attention_on(hybrid, tokens, keys[:, 1:], queries)
    for k, q in ((torch.zeros_like(keys), queries), (keys, torch.zeros_like(queries)), (keys, keys.roll(-4, 1))):
        with pytest.raises(ProbeError, match="every sequence must have a marked query behind its first token"):
            attention_on(hybrid, tokens, k, q)
    with pytest.raises(ProbeError, match="'layer_encoding' is missing"):
        by_layer_encoding(pd.DataFrame({"layer": [0], "head": [0], "metric": ["m"], "value": [1.0]}))
    rows = attention_on(hybrid, tokens, keys, queries, **QUICK)
    with pytest.raises(ProbeError, match="one row a head was wanted of 'on_keys', got two"):
        by_layer_encoding(pd.concat([rows, rows]))
    with pytest.raises(ProbeError, match="rows of the metric 'sink' were wanted, got on_keys, on_first"):
        by_layer_encoding(rows, ["sink"])
