import pytest
import torch

import probe
from probe.models.encodings import ENCODINGS
from probe.models.lens import to_bridge
from probe.tracing import trace

SHAPES = {
    "plain": {},
    "llama-like": {"normalization": "rms", "activation": "swiglu", "bias": False, "n_kv_heads": 2, "d_head": 6},
    "parallel": {"parallel": True, "embedding_norm": True, "activation": "gelu_tanh", "bias": ("norm", "qkv")},
    "no norm, tied": {"normalization": "none", "activation": "relu", "tie_embeddings": True, "score_scale": 1.0},
}


@pytest.fixture(params=ENCODINGS)
def encoding(request):
    return request.param


def compare(decoder, tokens):
    """The logits and the values at all sites of a decoder and its bridge."""
    bridge = to_bridge(decoder)
    torch.testing.assert_close(bridge(tokens), decoder(tokens), atol=1e-5, rtol=1e-5)
    sites = decoder.config.sites()
    ours, theirs = trace(decoder, tokens, sites), trace(bridge, tokens, sites)
    for site in sites:
        # -inf at future keys is equal to -inf; the true scores before the softmax are compared by this, too.
        torch.testing.assert_close(ours[site], theirs[site], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_agree_and_every_site_is_the_same(encoding, shape, make_decoder, random_tokens):
    compare(make_decoder(encoding=encoding, **shape), random_tokens())


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_partial_rotation(fraction, make_decoder, random_tokens):
    compare(make_decoder(encoding="rotary", encoding_options={"fraction": fraction}), random_tokens())


@pytest.mark.parametrize("base", ["learned", "t5", "transformer_xl", "xpos"])
def test_randomized_positions(base, make_decoder, random_tokens):
    compare(make_decoder(encoding="randomized", encoding_options={"base": base, "max_position": 99}), random_tokens())


def test_hybrid_layers(encoding, make_decoder, random_tokens):
    if encoding in ("none", "learned", "sinusoidal", "randomized"):
        pytest.skip("acts on the embeddings")
    compare(make_decoder(encoding=encoding, position_layers=(1,)), random_tokens())


@pytest.mark.parametrize("kind", ["rotary", "xpos", "transformer_xl", "cope"])
@pytest.mark.parametrize("site", ["hook_rot_q", "hook_rot_k"])
def test_edited_queries_and_keys_reach_the_scores_and_their_bias(kind, site, make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding=kind), random_tokens()
    name = f"blocks.1.attn.{site}"
    theirs = to_bridge(decoder).run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: 2 * value)])
    ours = decoder(tokens, hooks={name: lambda value: 2 * value})
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert (ours - decoder(tokens)).abs().max() > 1e-2


def test_an_edited_pattern_and_edited_scores_change_the_logits(encoding, make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding=encoding), random_tokens()
    bridge = to_bridge(decoder)
    plain = bridge(tokens)

    def uniform(pattern, hook):
        return torch.ones_like(pattern).tril() / torch.arange(1, 17)[:, None]

    def no_scores(scores, hook):
        return torch.zeros_like(scores).masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), -torch.inf)

    site = "blocks.0.attn.hook_pattern"
    edited = bridge.run_with_hooks(tokens, fwd_hooks=[(site, uniform)])
    assert (edited - plain).abs().max() > 1e-3
    # The decoder's own hooks do the same edit, and equal scores are a uniform pattern.
    ours = decoder(tokens, hooks={site: lambda pattern: uniform(pattern, None)})
    torch.testing.assert_close(edited, ours, atol=1e-5, rtol=1e-5)
    by_scores = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_attn_scores", no_scores)])
    torch.testing.assert_close(by_scores, edited, atol=1e-5, rtol=1e-5)


def test_the_decoder_is_left_untouched_and_its_parameters_are_shared(make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding="t5"), random_tokens()
    before, keys = decoder(tokens), list(decoder.state_dict())
    modules = [(name, id(module)) for name, module in decoder.named_modules()]
    bridge = to_bridge(decoder)
    bridge.run_with_cache(tokens)
    assert list(decoder.state_dict()) == keys
    assert [(name, id(module)) for name, module in decoder.named_modules()] == modules
    assert torch.equal(decoder(tokens), before)
    with torch.no_grad():
        decoder.head.weight.mul_(2)
    torch.testing.assert_close(bridge(tokens), 2 * before, atol=1e-5, rtol=1e-5)


def test_weights_and_logit_lens_are_there(make_decoder, random_tokens):
    decoder, tokens = make_decoder(), random_tokens()
    bridge = to_bridge(decoder)
    W_Q = decoder.layers[1].attention.q_proj.weight.view(4, 8, 32).transpose(1, 2)
    torch.testing.assert_close(bridge.W_Q[1], W_Q)
    assert bridge.W_U.shape == (32, 19)
    _, cache = bridge.run_with_cache(tokens)
    residual = cache.accumulated_resid(layer=-1, incl_mid=False, apply_ln=True)[-1]
    torch.testing.assert_close(residual @ bridge.W_U, decoder(tokens), atol=1e-4, rtol=1e-4)


def test_a_model_of_transformers_is_bridged_where_somebody_asks(random_tokens):
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=19, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    before = [name for name, _ in theirs.named_modules()]
    model, tokens = probe.wrap(theirs), random_tokens()
    bridge = to_bridge(model)
    torch.testing.assert_close(bridge(tokens), model(tokens), atol=1e-5, rtol=1e-5)
    site = "blocks.1.attn.hook_pattern"
    ours, of_bridge = (probe.trace(m, tokens, [site])[site] for m in (model, bridge))
    torch.testing.assert_close(of_bridge, ours, atol=1e-5, rtol=1e-5)
    assert [name for name, _ in theirs.named_modules()] == before
    assert {p.data_ptr() for p in bridge.parameters()} <= {p.data_ptr() for p in theirs.parameters()}
