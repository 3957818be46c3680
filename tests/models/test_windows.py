"""Decoders with sliding windows: transformers' Mistral is the oracle, and every path computes the same."""

import json
import math

import pytest
import torch
import transformers

import probe
from probe.attention import attention_summary, stream
from probe.errors import ProbeError
from probe.models import layer_encodings, to_bridge
from probe.models.anatomy import layers_of
from probe.models.encodings import ENCODINGS
from probe.models.hidden_keys import nearest_keys
from probe.tracing import trace
from probe.training import greedy

LENGTH, WINDOW = 14, 5
HYBRID = {"n_layers": 4, "encoding": "rotary", "position_layers": (0, 1, 2), "windows": (WINDOW, WINDOW, WINDOW, None)}


def test_a_window_is_mistrals(tmp_path, random_tokens):
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=19, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=WINDOW, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    theirs = transformers.MistralForCausalLM(config).eval()
    same = {name: value for name, value in config.to_dict().items() if name not in ("sliding_window", "model_type")}
    full = transformers.LlamaConfig(**same)
    as_llama = transformers.LlamaForCausalLM(full).eval()
    as_llama.load_state_dict(theirs.state_dict())
    as_llama.save_pretrained(tmp_path)
    ours = probe.load_pretrained(tmp_path, device="cpu")
    windowed = probe.Decoder(probe.DecoderConfig.from_dict(vars(ours.config) | {"windows": WINDOW}))
    windowed.load_state_dict(ours.state_dict())
    tokens = random_tokens(length=LENGTH)
    with torch.no_grad():
        wanted = theirs(tokens).logits
        torch.testing.assert_close(windowed.eval()(tokens), wanted, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ours(tokens), wanted, atol=1e-3)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_path_hides_the_same_keys(encoding, make_decoder, random_tokens):
    decoder = make_decoder(encoding=encoding, windows=(WINDOW, None)).eval()
    tokens = random_tokens(length=LENGTH)
    traced = trace(decoder, tokens, ["attn.hook_attn_scores", "attn.hook_pattern"])
    seen = nearest_keys(torch.arange(1, LENGTH + 1).clamp(max=WINDOW))
    assert torch.equal(traced.scores(0) > -math.inf, seen.expand_as(traced.scores(0)))
    assert torch.equal(traced.visible(0)[0, 0], seen) and traced.visible(1)[0, 0].sum() == LENGTH * (LENGTH + 1) / 2
    torch.testing.assert_close(traced.pattern(0), traced.scores(0).softmax(-1))
    with torch.no_grad():
        explicit, fused = (decoder(tokens, attention=path) for path in ("explicit", "fused"))
        torch.testing.assert_close(fused, explicit)
        torch.testing.assert_close(to_bridge(decoder)(tokens), explicit)
        cache = decoder.new_cache()
        parts = [decoder(part, cache=cache) for part in (tokens[:, :6], tokens[:, 6:7], tokens[:, 7:])]
        torch.testing.assert_close(torch.cat(parts, 1), explicit)


def test_a_hybrid_trains_streams_and_is_measured(make_decoder, random_tokens):
    decoder = make_decoder(**HYBRID)
    seen = [(layer.encoding, layer.window) for layer in layers_of(decoder)]
    assert seen == [("rotary", WINDOW)] * 3 + [("none", None)]
    tokens = random_tokens(length=LENGTH)
    decoder.train()(tokens).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
    decoder.eval()
    rows = stream(decoder, tokens[:2]).rows().query("metric == 'entropy'")
    dense = attention_summary(trace(decoder, tokens[:2]), n_bootstrap=1).query("metric == 'entropy'")
    merged = rows.merge(dense, on=["layer", "head", "query"])
    torch.testing.assert_close(torch.tensor(merged["value_x"]), torch.tensor(merged["value_y"]), atol=1e-5, rtol=1e-5)
    assert merged["n_visible_x"].tolist() == merged["n_visible_y"].tolist()
    assert len(greedy(decoder, tokens[:3], stop=-1, max_new=8)[0]) == 8
    assert layer_encodings(to_bridge(decoder)) == ["rotary"] * 3 + ["none"]
    assert probe.DecoderConfig.from_dict(json.loads(decoder.config.to_json())) == decoder.config


def test_bad_windows_are_one_clear_line():
    shape = {"d_vocab": 9, "n_ctx": 8, "n_layers": 2, "d_model": 8, "n_heads": 2}
    for windows, message in [
        ((4,), "windows must be one for each of 2 layers, got 1"),
        (0, "windows must be"),
        ((4, -1), "windows must be"),
    ]:
        with pytest.raises(ProbeError, match=message):
            probe.DecoderConfig(**shape, windows=windows)
