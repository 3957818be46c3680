"""What is built on models, on decoders of transformers: streams, generation, temperatures, twins, threads, copies."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from decoder_classes import build, tokens_of
from released import relative

import probe
from probe.attention import stream
from probe.errors import ProbeError
from probe.extrapolation import HeadScale, scaled
from probe.models import untrained_twin, weights_digest
from probe.models.open.wrapping import wrap
from probe.models.pretrained import load_pretrained
from probe.tracing import trace
from probe.training import greedy


@pytest.mark.parametrize("kind", ["llama", "cohere2", "granitemoehybrid", "deepseek_v3"])
def test_streamed_attention_is_that_of_the_dense_pattern(kind):
    model = build(kind)
    wrapped, tokens = wrap(model), tokens_of(model, length=40)
    streamed = stream(wrapped, tokens)
    dense = trace(wrapped, tokens, ["attn.hook_pattern"])
    attending = [i for i, layer in enumerate(wrapped.anatomy.layers) if layer.attends]
    assert [*streamed.layers] == attending
    for layer in attending:
        assert streamed.windows[layer] == wrapped.anatomy.layers[layer].window
        pattern = dense.pattern(layer).double()
        entropy = torch.special.entr(pattern).sum(-1)
        torch.testing.assert_close(streamed.layers[layer].entropy.double(), entropy, atol=1e-4, rtol=1e-4)
        distance = torch.arange(40)[:, None] - torch.arange(40)
        mean = (pattern * distance).sum(-1)
        torch.testing.assert_close(streamed.layers[layer].mean_distance.double(), mean, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(streamed.layers[layer].first.double(), pattern[..., 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "kind, why", [("gpt_oss", "a learned sink"), ("gemma2", "a cap on scores"), ("inkling_text", "a bias")]
)
def test_what_does_not_follow_from_queries_and_keys_is_not_streamed(kind, why):
    model = build(kind)
    with pytest.raises(ProbeError, match=f"streaming needs scores of q·k alone, but layer 0 has {why}"):
        stream(wrap(model), tokens_of(model))


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "granitemoehybrid", "lfm2"])
def test_greedy_with_its_cache_says_what_transformers_generates(kind):
    model = build(kind)
    wrapped, tokens = wrap(model), tokens_of(model, batch=3, length=12)
    theirs = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False, eos_token_id=None
    )[:, 12:].tolist()
    assert greedy(wrapped, tokens, stop=-1, max_new=8) == theirs
    stop = theirs[0][3]  # a sequence that ends leaves the batch, and the others go on
    ended = [said[: said.index(stop)] if stop in said else said for said in theirs]
    assert greedy(wrapped, tokens, stop=stop, max_new=8) == ended


def test_a_temperature_multiplies_scores_and_its_gradient_arrives():
    model = build("qwen2")
    wrapped, tokens = wrap(model), tokens_of(model)
    plain = trace(wrapped, tokens, ["attn.hook_attn_scores"])
    with HeadScale(wrapped, 1.5) as hot:
        hotter = trace(wrapped, tokens, ["attn.hook_attn_scores"])
        visible = plain.scores(0) > -torch.inf
        assert relative(hotter.scores(0)[visible], 1.5 * plain.scores(0)[visible]) < 1e-5
        wrapped(tokens).logsumexp(-1).sum().backward()
    gradient = hot.scale.grad
    assert gradient.shape == (4, 4) and torch.isfinite(gradient).all() and (gradient.abs() > 0).all()
    other = scaled(wrapped, 1.5)
    by_hand = {f"blocks.{i}.attn.hook_attn_scores": lambda scores: 1.5 * scores for i in range(4)}
    assert relative(other(tokens), wrapped.run(tokens, by_hand)) < 1e-5 < relative(other(tokens), wrapped(tokens))


def test_a_loaded_model_has_the_attention_that_transformers_takes_by_default(tmp_path):
    build("qwen2").save_pretrained(tmp_path)
    assert load_pretrained(tmp_path, device="cpu").config._attn_implementation == "sdpa"


def test_half_precision_is_loaded_as_it_is_stored(tmp_path):
    build("qwen2").to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_pretrained(tmp_path, device="cpu")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert load_pretrained(tmp_path, device="cpu", dtype=torch.float32).dtype == torch.float32
    assert [layer.encoding for layer in model.anatomy.layers] == ["rotary"] * 4


def test_twin_and_digest(tmp_path):
    model = build("granitemoehybrid")
    wrapped, tokens = wrap(model), tokens_of(model)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, device="cpu")
    assert weights_digest(loaded) == weights_digest(wrapped) == weights_digest(model)
    assert weights_digest(wrap(build("granitemoehybrid", seed=1))) != weights_digest(wrapped)
    before = torch.random.get_rng_state()
    twins = [untrained_twin(wrapped, seed) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert weights_digest(twins[0]) == weights_digest(twins[1]) != weights_digest(twins[2])
    assert twins[0].anatomy == wrapped.anatomy and relative(twins[0](tokens), wrapped(tokens)) > 0.1


def test_two_threads_see_each_its_own_pass():
    model = build("cohere2")
    wrapped = wrap(model)
    inputs = [tokens_of(model, seed=seed) for seed in range(4)]
    wanted = [trace(wrapped, tokens, ["attn.hook_pattern", "hook_resid_post"]) for tokens in inputs]
    with ThreadPoolExecutor(2) as pool:
        got = [*pool.map(lambda tokens: trace(wrapped, tokens, ["attn.hook_pattern", "hook_resid_post"]), inputs * 3)]
    for i, seen in enumerate(got):
        for site, value in wanted[i % 4].values.items():
            assert torch.equal(seen.values[site], value), site
    assert model.config._attn_implementation == "eager"


def test_a_wrapped_model_is_copied_and_saved():
    model = build("cohere2")
    wrapped, tokens = wrap(model), tokens_of(model)
    twin = copy.deepcopy(wrapped)
    file = io.BytesIO()
    torch.save(wrapped, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        seen = [trace(m, tokens, ["attn.hook_pattern", "hook_resid_post"]) for m in (wrapped, other)]
        for site, value in seen[0].values.items():
            assert torch.equal(seen[1].values[site], value)
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert relative(other(tokens), wrapped(tokens)) > 0.1


def test_float64_is_opened_though_transformers_takes_the_softmax_in_float32():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    model = probe.wrap(transformers.LlamaForCausalLM(config).double().eval())
    found = probe.trace(model, torch.arange(9)[None], ["attn.hook_attn_scores", "attn.hook_pattern"])
    assert found.pattern(0).dtype == torch.float64
    torch.testing.assert_close(found.pattern(0), found.scores(0).softmax(-1), atol=1e-12, rtol=1e-12)
