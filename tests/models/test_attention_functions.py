import json
import math
import subprocess
import sys

import entmax
import numpy as np
import pytest
import torch
import transformers
from scipy import optimize, stats

import probe
from probe.attention import attention_inputs, stream
from probe.errors import ProbeError
from probe.models.attention_functions import ATTENTION_FUNCTIONS, make_attention_function
from probe.models.checkpoint import load, save
from probe.models.decoder import DecoderConfig, KVCache
from probe.models.encodings import ENCODINGS
from probe.models.lens import to_bridge
from probe.tracing import trace

DIMS = {"d_model": 16, "n_heads": 4, "n_ctx": 32}
# Short enough that a test's sequences of 16 tokens go beyond it.
OPTIONS = {"log_length": {"trained_length": 5, "a": 0.9}, "asentmax": {"gamma_range": 2.0}}
SOFTMAXES = [name for name, kind in ATTENTION_FUNCTIONS.items() if kind.is_softmax]
ENTMAXES = [name for name in ATTENTION_FUNCTIONS if name not in SOFTMAXES]
PATTERN, SCORES = "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"


@pytest.fixture(params=ATTENTION_FUNCTIONS)
def name(request):
    return request.param


@pytest.fixture
def make(make_decoder):
    """A decoder with that attention function, whose parameters are such that a test sees them."""

    def make(name, **options):
        decoder = make_decoder(attention_function=name, attention_options=OPTIONS.get(name, {}), **options)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for block in decoder.layers:
                for parameter in block.attention.function.parameters():
                    # Weights of the hidden states so small that scores stay in a range that float32 knows well.
                    size = 0.2 if parameter.ndim > 1 else 1.0
                    parameter.copy_(size * (torch.rand(parameter.shape, generator=generator) - 0.2))
        return decoder

    return make


def seen_by(decoder, tokens, *sites, **call):
    seen = {}
    decoder(tokens, hooks={site: lambda value, site=site: seen.update({site: value}) for site in sites}, **call)
    return [seen[site].detach() for site in sites]


def test_rows_sum_to_1_and_hidden_keys_have_exactly_0(name, make, random_tokens):
    future = torch.ones(16, 16, dtype=torch.bool).triu(1)
    for dtype, tolerance in [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]:
        pattern, scores = seen_by(make(name).to(dtype), random_tokens(), PATTERN, SCORES)
        assert pattern.dtype == dtype and (pattern >= 0).all()
        assert (scores[..., future] == -math.inf).all() and (pattern[..., future] == 0).all()
        torch.testing.assert_close(pattern.sum(-1), torch.ones(3, 4, 16, dtype=dtype), atol=tolerance, rtol=0)


@pytest.mark.parametrize("encoding", ["none", "rotary", "xpos", "alibi", "transformer_xl", "cope"])
def test_a_cache_changes_nothing(name, encoding, make, random_tokens):
    decoder, tokens = make(name, encoding=encoding, n_kv_heads=2).double(), random_tokens()
    cache = KVCache()
    parts = [decoder(tokens[:, a:b], cache=cache) for a, b in [(0, 5), (5, 6), (6, 15), (15, 16)]]
    torch.testing.assert_close(torch.cat(parts, dim=1), decoder(tokens), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_it_is_causal_with_every_encoding(name, encoding, make, random_tokens):
    decoder, tokens = make(name, encoding=encoding), random_tokens()
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 19
    before, after = decoder(tokens), decoder(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=1e-6, rtol=0)
    if ATTENTION_FUNCTIONS[name].is_softmax:
        torch.testing.assert_close(decoder(tokens, attention="fused"), before, atol=1e-5, rtol=1e-5)


def test_the_default_is_what_decoders_have_always_been(make_decoder, random_tokens):
    default = make_decoder(encoding="t5")
    fields = json.loads(default.config.to_json())
    assert "attention_function" not in fields and "attention_options" not in fields
    assert DecoderConfig.from_dict(fields) == default.config
    assert not [key for key in default.state_dict() if "function" in key]
    written = DecoderConfig.from_dict(fields | {"attention_function": "softmax", "attention_options": {}})
    assert written == default.config
    q, k, v = (default.layers[0].attention.get_submodule(f"{x}_proj") for x in "qkv")
    z, normed = seen_by(default, random_tokens(), "blocks.0.attn.hook_z", "blocks.0.hook_resid_pre")
    normed = default.layers[0].attention_norm(normed)
    q, k, v = (p(normed).unflatten(-1, (4, 8)).transpose(1, 2) for p in (q, k, v))
    mask = default.encoding.bias(torch.arange(16), torch.arange(16), q)[None].clone()
    mask = mask.masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), -math.inf)
    assert torch.equal(z, (((q * 8**-0.5) @ k.transpose(-1, -2) + mask).softmax(-1) @ v).transpose(1, 2))


def test_all_other_weights_are_those_of_a_softmax_decoder(name, make_decoder):
    ours, plain = make_decoder(encoding="t5", attention_function=name).state_dict(), make_decoder(encoding="t5")
    for key, weight in plain.state_dict().items():
        assert torch.equal(ours.pop(key), weight)
    assert all(".attention.function." in key and weight.isfinite().all() for key, weight in ours.items())


def test_entmax_solves_its_problem():
    scores = torch.randn(20, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    hidden = torch.rand(20, 9, generator=torch.Generator().manual_seed(1)) < 0.4
    hidden[:, 4] = False
    scores = scores.masked_fill(hidden, -math.inf)
    pattern = make_attention_function("entmax15", {}, **DIMS).normalise(scores)
    for row, got in zip(scores.numpy(), pattern.numpy(), strict=True):

        def p(tau, row=row):
            return np.maximum(row / 2 - tau, 0) ** 2

        tau = optimize.brentq(lambda tau: p(tau).sum() - 1, row.max() / 2 - 1, row.max() / 2, xtol=1e-15)
        np.testing.assert_allclose(got, p(tau), atol=1e-12)
        # The package on what is left when the hidden keys are taken away.
        alone = entmax.entmax15(torch.from_numpy(row[np.isfinite(row)]), dim=-1)
        np.testing.assert_allclose(got[np.isfinite(row)], alone, atol=1e-15)
    assert ((pattern == 0) & ~hidden).any()


def test_hidden_keys_change_neither_entmax_nor_its_gradient():
    function = make_attention_function("entmax15", {}, **DIMS)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 7, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(5, 7, dtype=torch.float64, generator=generator)
    (function.normalise(scores) * weight).sum().backward()
    alone, scores.grad = scores.grad, None
    padded = torch.cat((scores, torch.full((5, 300), -math.inf, dtype=torch.float64)), dim=1)
    pattern = function.normalise(padded)
    assert (pattern[:, 7:] == 0).all()
    torch.testing.assert_close(pattern[:, :7], function.normalise(scores))
    (pattern[:, :7] * weight).sum().backward()
    torch.testing.assert_close(scores.grad, alone)
    assert torch.autograd.gradcheck(function.normalise, (scores.detach().requires_grad_(),))


def test_scales_are_literal_numbers():
    hidden = torch.zeros(2, 4, 16, dtype=torch.float64)

    def scale(name, options, first):
        function = make_attention_function(name, options, **DIMS).double().requires_grad_(False)
        function.reset_parameters()
        return function.query_scale(hidden, first)

    assert scale("softmax", {}, 0) is None and scale("entmax15", {}, 0) is None
    # The queries see 3, 4, 5 and 6 keys; 1 + 0.3973 ln(6/4) = 1.161091...
    got = scale("log_length", {"trained_length": 4}, 2)
    assert got.shape == (1, 4, 4)
    assert got[0, :, 3].tolist() == pytest.approx([1, 1, 1.0886549, 1.1610913], abs=1e-6)
    assert scale("log_length", {"a": 0.0}, 1000)[0, :, 0].tolist() == [1, 1, 1, 1]
    assert scale("log_length", {}, 60)[0, -1, 0] == pytest.approx(1 + 0.3973 * math.log(2))  # 64 keys, n_ctx 32
    # ln n / ln 32 = log2(n) / 5.
    got = scale("ssmax", {}, 0)
    assert got.shape == (1, 4, 4)
    assert got[0, :, 2].tolist() == pytest.approx([0, 0.2, math.log2(3) / 5, 0.4])
    assert scale("ssmax", {}, 28)[0, -1, 0] == pytest.approx(1)
    got = scale("asentmax", {}, 0)
    assert got.shape == (2, 4, 4)
    assert got.flatten().tolist() == pytest.approx([1.0181499] * 32, abs=1e-6)  # 1 + ln(1 + e^-4)


def test_position_scale_is_the_temperature_of_llama_4():
    """The attention of transformers' class, fed one state, without positions: its scores are its temperature."""
    config = transformers.Llama4TextConfig(
        vocab_size=19, hidden_size=16, intermediate_size=16, intermediate_size_mlp=16, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, no_rope_layers=[0], attn_temperature_tuning=True, floor_scale=3,
        attn_scale=0.4, num_local_experts=2, pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = probe.wrap(transformers.Llama4ForCausalLM(config).eval())
    scores = probe.trace(model, torch.full((1, 12), 5), ["attn.hook_attn_scores"]).scores(0)[0, 0, :, 0]
    function = make_attention_function("position_scale", {"a": 0.4, "step": 3}, **DIMS)
    ours = function.query_scale(torch.zeros(1, 12, DIMS["d_model"]), 0)[0, :, 0]
    torch.testing.assert_close(ours / ours[0], scores / scores[0])
    later = function.query_scale(torch.zeros(1, 5, DIMS["d_model"]), 7)[0, :, 0]
    assert torch.equal(later, ours[7:])
    assert function.query_scale(torch.zeros(1, 2, DIMS["d_model"]), 0).eq(1).all()


def test_asentmax_scales_each_head_and_query_by_its_formula():
    function = make_attention_function("asentmax", {"gamma_range": 3.0}, **DIMS).double()
    generator = np.random.default_rng(0)
    w_beta, w_gamma, b = generator.normal(size=(4, 16)), generator.normal(size=(4, 16)) / 4, generator.normal(size=4)
    state = {"w_beta": w_beta, "w_gamma": w_gamma, "b_beta": b}
    function.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    hidden = generator.normal(size=(2, 5, 16))
    got = function.query_scale(torch.from_numpy(hidden), 3).detach().numpy()
    for batch, pos, head in np.ndindex(2, 5, 4):
        h, n = hidden[batch, pos], 3 + pos + 1
        beta = math.log1p(math.exp(w_beta[head] @ h + b[head]))
        wanted = 1 + beta * math.log(n) ** (3 * math.tanh(w_gamma[head] @ h))
        assert got[batch, pos, head] == pytest.approx(wanted, rel=1e-12)


def test_scores_are_scaled_query_by_query_before_the_bias(make, random_tokens):
    scaled, tokens = make("log_length", encoding="alibi"), random_tokens()
    plain = make("softmax", encoding="alibi")
    ours, theirs = (seen_by(d, tokens, "blocks.0.attn.hook_attn_scores")[0] for d in (scaled, plain))
    bias = plain.encoding.bias(torch.arange(16), torch.arange(16), ours)
    factor = torch.tensor([1 + 0.9 * max(0.0, math.log(n / 5)) for n in range(1, 17)])
    torch.testing.assert_close(ours, (theirs - bias) * factor[:, None] + bias, atol=1e-5, rtol=1e-5)


def test_ssmax_starts_as_softmax_at_full_length(make_decoder, random_tokens):
    tokens, sites = random_tokens(), ("blocks.0.attn.hook_pattern",)
    ours = seen_by(make_decoder(attention_function="ssmax", n_ctx=16), tokens, *sites)[0]
    theirs = seen_by(make_decoder(n_ctx=16), tokens, *sites)[0]
    torch.testing.assert_close(ours[:, :, -1], theirs[:, :, -1])
    assert (ours - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("start", ["drawn", "initial"])
def test_gradients_are_finite_and_reach_every_parameter(name, start, make, make_decoder, random_tokens):
    decoder = make(name) if start == "drawn" else make_decoder(attention_function=name)
    decoder = decoder.double().train()
    paths = ["explicit", "fused"] if name in SOFTMAXES else ["explicit"]
    grads = []
    for path in paths:
        decoder.zero_grad()
        decoder(random_tokens(), attention=path).log_softmax(-1)[..., 3].sum().backward()
        assert all(p.grad.isfinite().all() for p in decoder.parameters())
        own = [p.grad.clone() for block in decoder.layers for p in block.attention.function.parameters()]
        assert all(grad.abs().max() > 1e-6 for grad in own)
        grads.append(own)
    torch.testing.assert_close(grads[0], grads[-1], atol=1e-8, rtol=1e-8)


def test_what_is_saved_comes_back_to_the_last_bit(name, make, random_tokens, tmp_path):
    decoder = make(name)
    save(decoder, tmp_path / "model")
    back = load(tmp_path / "model")
    assert back.config == decoder.config
    assert torch.equal(back(random_tokens()), decoder(random_tokens()))


@pytest.mark.parametrize("encoding", ["none", "rotary", "xpos", "t5", "transformer_xl", "cope"])
def test_the_bridge_agrees_at_every_site(name, encoding, make, random_tokens):
    # In double precision, as content biases make scores at which float32 is too coarse to tell a small error.
    decoder, tokens = make(name, encoding=encoding, n_kv_heads=2).double(), random_tokens()
    bridge = to_bridge(decoder)
    torch.testing.assert_close(bridge(tokens), decoder(tokens), atol=1e-5, rtol=1e-5)
    sites = decoder.config.sites()
    ours, theirs = trace(decoder, tokens, sites), trace(bridge, tokens, sites)
    for site in sites:
        torch.testing.assert_close(ours[site], theirs[site], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("site", ["hook_rot_q", "hook_attn_scores", "hook_pattern"])
def test_edits_in_the_bridge_are_those_in_the_decoder(name, site, make, random_tokens):
    decoder, tokens, where = make(name), random_tokens(), f"blocks.0.attn.{site}"

    def edit(value, hook=None):
        return value * (torch.arange(1, 1 + value.shape[-1]) / 4)

    ours = decoder(tokens, hooks={where: edit})
    torch.testing.assert_close(
        to_bridge(decoder).run_with_hooks(tokens, fwd_hooks=[(where, edit)]), ours, atol=1e-5, rtol=1e-5
    )
    assert (ours - decoder(tokens)).abs().max() > 1e-3


def test_edited_hidden_states_decide_the_scale_in_the_bridge(make, random_tokens):
    decoder, tokens = make("asentmax"), random_tokens()
    edited = make("asentmax")
    with torch.no_grad():
        edited.layers[0].attention_norm.weight.mul_(-1)
    where = "blocks.0.attn.hook_in"
    theirs = to_bridge(decoder).run_with_hooks(tokens, fwd_hooks=[(where, lambda value, hook: -value)])
    torch.testing.assert_close(theirs, edited(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["log_length", "ssmax"])
@pytest.mark.parametrize("encoding", ["none", "alibi", "rotary"])
def test_streaming_sees_scaled_scores(name, encoding, make, random_tokens):
    decoder, tokens = make(name, encoding=encoding), random_tokens()
    pattern = seen_by(decoder, tokens, PATTERN, attention="explicit")[0].double().numpy()
    for model in (decoder, to_bridge(decoder)):
        entropy = stream(model, tokens).layers[1].entropy
        np.testing.assert_allclose(entropy, stats.entropy(pattern, axis=-1), atol=1e-5)


@pytest.mark.parametrize("name", ENTMAXES)
def test_what_wants_a_softmax_refuses_others(name, make, random_tokens):
    decoder, tokens = make(name), random_tokens()
    with pytest.raises(ProbeError, match=f"fused attention wants a softmax, got attention function '{name}'"):
        decoder(tokens, attention="fused")
    for model in (decoder, to_bridge(decoder)):
        with pytest.raises(ProbeError, match=f"patterns that are a softmax of the scores, got .* '{name}'"):
            attention_inputs(model, tokens, lambda layer, inputs: None)
    # "auto" takes the explicit path at lengths at which softmax is fused.
    long = random_tokens(batch=1, length=600)
    assert torch.equal(decoder(long), decoder(long, attention="explicit"))


def test_bad_options_are_one_clear_line(make_decoder):
    def bad(message, name, **options):
        with pytest.raises(ProbeError, match=message):
            make_decoder(attention_function=name, attention_options=options)

    known = "asentmax, entmax15, log_length, position_scale, softmax, ssmax"
    bad(f"unknown attention function 'relu'; known: {known}", "relu")
    bad("attention function 'softmax' has no option 'a'; it has: none", "softmax", a=1)
    bad("attention function 'ssmax' has no option 'n_heads'; it has: none", "ssmax", n_heads=1)
    bad("'log_length' has no option 's'; it has: a, trained_length", "log_length", s=1)
    bad("a must be a number at least 0, got -1", "log_length", a=-1)
    bad("trained_length must be an integer of at least 1, got 0", "log_length", trained_length=0)
    bad("gamma_range must be a number above 0, got 0", "asentmax", gamma_range=0)


def test_import_probe_imports_no_entmax():
    code = "import probe, sys; probe.Decoder; print('entmax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
