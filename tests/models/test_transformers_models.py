"""Decoders of transformers through the attention seam: transformers is the oracle for what is seen and edited."""

import copy
import functools

import pytest
import torch
from decoder_classes import build, tokens_of
from decoder_layers import LAYERS
from released import relative

from probe.models.open.wrapping import wrap
from probe.tracing import logits_with_edits, trace

KINDS = list(LAYERS)
SINKS = [kind for kind, layers in LAYERS.items() if any(layer.sink for layer in layers)]
# Their patterns are given out before the sink has taken its share.
BEFORE_THE_SINK = ("granite_swa", "granitemoe_swa")


@functools.cache
def opened(kind):
    """A model, the wrapped model, and tokens."""
    model = build(kind)
    return model, wrap(model), tokens_of(model)


def attending(kind):
    return [i for i, layer in enumerate(LAYERS[kind]) if layer.attends]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_patterns_and_hidden_states_are_those_of_eager_attention(kind):
    model, wrapped, tokens = opened(kind)
    with torch.no_grad():
        eager = model(tokens, use_cache=False, output_attentions=True, output_hidden_states=True)
    assert relative(wrapped(tokens), eager.logits) < 1e-5
    sites = ["attn.hook_pattern", "attn.hook_attn_scores", "hook_resid_pre", "hook_resid_post"]
    seen = trace(wrapped, tokens, sites)
    assert relative(wrapped.run(tokens, {}, explicit=True), eager.logits) < 1e-5
    theirs = [pattern for pattern in eager.attentions if pattern is not None]
    if len(theirs) != len(attending(kind)):  # linear attention gives something out too
        theirs = [theirs[layer] for layer in attending(kind)]
    hidden = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    for layer, pattern in zip(attending(kind), theirs, strict=True):
        said = LAYERS[kind][layer]
        ours, scores = seen.pattern(layer), seen.scores(layer)
        beyond = hidden if said.window is None else hidden | ~hidden.logical_not().triu(1 - said.window)
        assert torch.equal(scores == -torch.inf, beyond.expand_as(scores))
        if kind in BEFORE_THE_SINK:
            ours = ours / ours.sum(-1, keepdim=True)
        torch.testing.assert_close(ours, pattern, atol=1e-5, rtol=1e-5)
        if not said.sink:
            torch.testing.assert_close(scores.softmax(-1), pattern, atol=1e-5, rtol=1e-5)
    for i in range(len(LAYERS[kind])):
        assert relative(seen[f"blocks.{i}.hook_resid_pre"], eager.hidden_states[i]) < 1e-5
        if i:
            assert torch.equal(seen[f"blocks.{i - 1}.hook_resid_post"], seen[f"blocks.{i}.hook_resid_pre"])


@pytest.mark.parametrize("kind", SINKS)
def test_a_sinks_share_is_that_of_one_more_key(kind):
    model, wrapped, tokens = opened(kind)
    seen = trace(wrapped, tokens, ["attn.hook_pattern", "attn.hook_attn_scores"])
    sinks = [weight for name, weight in model.named_parameters() if "sink" in name]
    layers = [i for i in attending(kind) if LAYERS[kind][i].sink]
    assert len(sinks) == len(layers) > 0
    for layer, sink in zip(layers, sinks, strict=True):
        scores = seen.scores(layer)
        one_more = torch.cat((scores, sink.detach().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1).softmax(-1)
        torch.testing.assert_close(seen.pattern(layer), one_more[..., :-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(1 - seen.pattern(layer).sum(-1), one_more[..., -1], atol=1e-5, rtol=1e-5)
        assert one_more[..., -1].max() > 0.1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SINKS])
def test_an_edit_of_scores_is_the_edit_of_the_pattern_that_they_make(kind):
    _, wrapped, tokens = opened(kind)
    layer = attending(kind)[0]
    scores, pattern = (f"blocks.{layer}.attn.hook_{name}" for name in ("attn_scores", "pattern"))

    def first_head_to_the_start(scores):
        scores = scores.clone()
        scores[:, 0, :, :2] += 3
        return scores

    wanted = trace(wrapped, tokens, ["attn.hook_attn_scores"]).scores(layer)
    wanted = first_head_to_the_start(wanted).softmax(-1)
    by_scores = logits_with_edits(wrapped, tokens, {scores: first_head_to_the_start})
    by_pattern = logits_with_edits(wrapped, tokens, {pattern: lambda _: wanted})
    assert relative(by_scores, by_pattern) < 1e-5
    assert relative(by_scores, wrapped(tokens)) > 1e-4


@pytest.mark.parametrize("kind", ["gemma2", "granitemoehybrid", "llama4_text", "gpt2", "falcon_h1", "minimax"])
def test_an_edit_of_the_stream_is_that_of_a_hook_on_the_module(kind):
    model, wrapped, tokens = opened(kind)
    stack = model.transformer.h if kind == "gpt2" else model.model.layers
    shift = torch.randn(tokens.shape[1], model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    plain = wrapped(tokens).detach()

    def by_hand(register):
        handle = register()
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits
        handle.remove()
        return logits

    def before(_, args, kwargs):
        return (args[0] + shift, *args[1:]), kwargs

    def after(_, __, out):
        return out + shift if isinstance(out, torch.Tensor) else (out[0] + shift, *out[1:])

    table, block = model.get_input_embeddings(), stack[1]
    for site, register in {
        "hook_embed": lambda: table.register_forward_hook(after),
        "blocks.1.hook_resid_pre": lambda: block.register_forward_pre_hook(before, with_kwargs=True),
        "blocks.1.hook_resid_post": lambda: block.register_forward_hook(after),
    }.items():
        edited = logits_with_edits(wrapped, tokens, {site: lambda x: x + shift})
        assert relative(edited, by_hand(register)) < 1e-5 < relative(edited, plain), site


@pytest.mark.parametrize("kind", ["llama", "gemma2", "olmo2"])
def test_the_stream_between_attention_and_mlp(kind):
    """It is what comes in and what attention adds, after its own norm where it has one; an edit moves all behind it."""
    model, wrapped, tokens = opened(kind)
    seen = trace(wrapped, tokens, ["hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_resid_post"])
    shift = torch.randn(tokens.shape[1], 64, generator=torch.Generator().manual_seed(2))
    for i, block in enumerate(model.model.layers):
        pre, out, mid, post = (
            seen[f"blocks.{i}.hook_{name}"] for name in ("resid_pre", "attn_out", "resid_mid", "resid_post")
        )

        def rest(x, block=block):  # what a block does after attention, in these three classes
            if kind == "llama":
                return x + block.mlp(block.post_attention_layernorm(x))
            if kind == "gemma2":
                return x + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x)))
            return x + block.post_feedforward_layernorm(block.mlp(x))

        with torch.no_grad():
            added = out if kind == "llama" else block.post_attention_layernorm(out)
            assert relative(mid, pre + added) < 1e-6
            assert relative(post, rest(mid)) < 1e-5
            moved = trace_with(wrapped, tokens, f"blocks.{i}.hook_resid_mid", shift, f"blocks.{i}.hook_resid_post")
            assert relative(moved, rest(mid + shift)) < 1e-5


def trace_with(model, tokens, site, shift, wanted):
    """The value at a site while another is shifted."""
    seen = []
    model.run(tokens, {site: lambda x: x + shift, wanted: lambda x: seen.append(x.detach())})
    return seen[0]


def test_z_is_the_pattern_times_the_values_and_all_that_attention_puts_out():
    model, wrapped, tokens = opened("qwen2")
    seen = trace(wrapped, tokens, ["attn.hook_pattern", "attn.hook_v", "attn.hook_z", "hook_attn_out"])
    for i, block in enumerate(model.model.layers):
        v = seen[f"blocks.{i}.attn.hook_v"].repeat_interleave(2, dim=2)
        z = torch.einsum("bhqk,bkhd->bqhd", seen.pattern(i), v)
        assert relative(seen[f"blocks.{i}.attn.hook_z"], z) < 1e-6
        with torch.no_grad():
            assert relative(seen[f"blocks.{i}.hook_attn_out"], block.self_attn.o_proj(z.flatten(2))) < 1e-6


def test_scores_are_made_of_the_turned_queries_and_keys_and_edits_of_them_reach_the_logits():
    _, wrapped, tokens = opened("qwen2")
    seen = trace(wrapped, tokens, ["attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_attn_scores"])
    q, k = (seen[f"blocks.1.attn.hook_rot_{name}"] for name in "qk")
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, dim=2)) / 4
    visible = seen.scores(1) > -torch.inf
    assert relative(scores[visible], seen.scores(1)[visible]) < 1e-6
    halved = logits_with_edits(wrapped, tokens, {"blocks.1.attn.hook_rot_q": lambda q: q / 2})
    by_scores = logits_with_edits(wrapped, tokens, {"blocks.1.attn.hook_attn_scores": lambda s: s / 2})
    assert relative(halved, by_scores) < 1e-5 < relative(halved, wrapped(tokens))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_model_stays_as_it_was(implementation):
    model = build("granitemoehybrid")
    model.set_attn_implementation(implementation)
    model.train()
    weights = copy.deepcopy(model.state_dict())
    tokens = tokens_of(model)
    wrapped = wrap(model)
    trace(wrapped, tokens, ["attn.hook_pattern", "hook_resid_mid"])
    with pytest.raises(RuntimeError, match="of a hook's"):
        wrapped.run(tokens, {"blocks.1.attn.hook_pattern": _fail})
    assert model.config._attn_implementation == implementation and model.training
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert {name: True for name in weights} == {n: torch.equal(w, weights[n]) for n, w in model.state_dict().items()}
    assert wrap(model).owner is model


def _fail(_):
    raise RuntimeError("of a hook's")
