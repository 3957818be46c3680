import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from probe.errors import ProbeError
from probe.limits import limits
from probe.models import decoder as decoder_module
from probe.models.decoder import Decoder, KVCache
from probe.models.encodings import ENCODINGS
from probe.models.layers import BlockwiseMask

SHAPES = {
    "plain": {},
    "rms, swiglu, no bias": {"normalization": "rms", "activation": "swiglu", "bias": False},
    "no norm, relu": {"normalization": "none", "activation": "relu"},
    "grouped heads, free d_head": {"n_kv_heads": 2, "d_head": 6},
    "parallel, norm behind the embedding": {"parallel": True, "embedding_norm": True, "activation": "gelu_tanh"},
    "tied head, score scale 1": {"tie_embeddings": True, "score_scale": 1.0, "logit_scale": 0.5},
}
IN_ATTENTION = [name for name in ENCODINGS if name not in ("none", "learned", "sinusoidal", "randomized")]


@pytest.fixture(params=ENCODINGS)
def encoding(request):
    return request.param


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fused_and_explicit_attention_agree(encoding, shape, make_decoder, random_tokens):
    decoder = make_decoder(encoding=encoding, **shape)
    tokens = random_tokens()
    explicit, fused = decoder(tokens, attention="explicit"), decoder(tokens, attention="fused")
    torch.testing.assert_close(explicit, fused, atol=1e-5, rtol=1e-5)


def test_every_encoding_is_causal(encoding, make_decoder, random_tokens):
    decoder = make_decoder(encoding=encoding)
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 19
    for path in ("explicit", "fused"):
        before, after = decoder(tokens, attention=path), decoder(changed, attention=path)
        torch.testing.assert_close(before[:, :9], after[:, :9], atol=1e-6, rtol=0)
        assert (before[:, 9:] - after[:, 9:]).abs().min(dim=-1).values.max() > 1e-3


def test_relative_encodings_and_nope_do_not_see_a_shift(encoding, make_decoder, random_tokens):
    # Within FIRE's threshold only the distance counts.
    options = {"threshold": 4.0} if encoding == "fire" else {}
    decoder = make_decoder(encoding=encoding, encoding_options=options, n_ctx=200).double()
    tokens = random_tokens()
    change = (decoder(tokens) - decoder(tokens, positions=torch.arange(100, 116))).abs().max()
    if encoding not in ("learned", "sinusoidal", "fire", "randomized"):
        assert change < 1e-12
    else:
        assert change > 1e-3


@pytest.mark.parametrize("layers", [None, (1,)], ids=["all layers", "hybrid"])
def test_a_cache_changes_nothing(encoding, layers, make_decoder, random_tokens):
    if layers is not None and encoding not in IN_ATTENTION:
        pytest.skip("acts on the embeddings")
    decoder = make_decoder(encoding=encoding, n_kv_heads=2, position_layers=layers)
    tokens = random_tokens()
    cache = KVCache()
    pieces = [
        decoder(part, cache=cache, attention=path)
        for part, path in [
            (tokens[:, :5], "explicit"),
            (tokens[:, 5:9], "fused"),
            (tokens[:, 9:10], "fused"),
            (tokens[:, 10:11], "explicit"),
            (tokens[:, 11:], "explicit"),
        ]
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), decoder(tokens), atol=1e-5, rtol=1e-5)
    assert cache.length == 16


def test_nope_layer_one_is_blind_to_the_order_of_the_prefix(make_decoder, random_tokens):
    # Theory: one layer without encoding sees a set, two layers see a sequence.
    tokens = random_tokens(batch=1)
    permuted = tokens.clone()
    permuted[:, 1:-1] = tokens[:, 1:-1].flip(1)
    one, two = make_decoder(n_layers=1).double(), make_decoder(n_layers=2).double()
    assert (one(tokens)[:, -1] - one(permuted)[:, -1]).abs().max() < 1e-13
    assert (two(tokens)[:, -1] - two(permuted)[:, -1]).abs().max() > 1e-4


def test_it_is_gpt2_with_gpt2s_weights(make_decoder, random_tokens):
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=19, n_positions=32, n_embd=32, n_layer=2, n_head=4, activation_function="gelu")
    ).eval()
    ours = make_decoder(encoding="learned", tie_embeddings=True)
    with torch.no_grad():
        ours.token_embedding.weight.copy_(theirs.transformer.wte.weight)
        ours.encoding.weight.copy_(theirs.transformer.wpe.weight)
        for block, their in zip(ours.layers, theirs.transformer.h, strict=True):
            block.attention_norm.load_state_dict(their.ln_1.state_dict())
            block.mlp_norm.load_state_dict(their.ln_2.state_dict())
            weights, biases = their.attn.c_attn.weight.T.split(32), their.attn.c_attn.bias.split(32)
            for projection, weight, bias in zip("qkv", weights, biases, strict=True):
                getattr(block.attention, f"{projection}_proj").load_state_dict({"weight": weight, "bias": bias})
            for mine, other in (
                (block.attention.o_proj, their.attn.c_proj),
                (block.mlp.up_proj, their.mlp.c_fc),
                (block.mlp.down_proj, their.mlp.c_proj),
            ):
                mine.load_state_dict({"weight": other.weight.T, "bias": other.bias})
        ours.final_norm.load_state_dict(theirs.transformer.ln_f.state_dict())
    tokens = random_tokens()
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_it_is_llama_with_llamas_weights(make_decoder, random_tokens):
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=19,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    ).eval()
    ours = make_decoder(encoding="rotary", normalization="rms", activation="swiglu", bias=False, n_kv_heads=2, d_mlp=48)
    names = {
        "model.embed_tokens": "token_embedding",
        "model.layers": "layers",
        "self_attn": "attention",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
        "model.norm": "final_norm",
        "lm_head": "head",
    }
    state = {}
    for name, weight in theirs.state_dict().items():
        for their, mine in names.items():
            name = name.replace(their, mine)
        state[name] = weight
    ours.load_state_dict(state)
    tokens = random_tokens()
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_scores_softmax_to_the_pattern_and_hide_the_future(encoding, make_decoder, random_tokens):
    decoder, seen = make_decoder(encoding=encoding), {}
    sites = ("blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern")
    decoder(random_tokens(), hooks={site: lambda value, site=site: seen.update({site: value}) for site in sites})
    scores, pattern = (seen[site] for site in sites)
    future = torch.ones(16, 16, dtype=torch.bool).triu(1)
    assert (scores[..., future] == -math.inf).all()
    torch.testing.assert_close(pattern, scores.softmax(-1))
    assert (pattern[..., future] == 0).all()


def test_hooks_edit_and_see_every_site(make_decoder, random_tokens):
    decoder, tokens = make_decoder(), random_tokens()
    plain = decoder(tokens)
    for site in decoder.config.sites():
        torch.testing.assert_close(decoder(tokens, hooks={site: lambda value: None}), plain, atol=1e-5, rtol=1e-5)
        edited = decoder(tokens, hooks={site: lambda value: value.flip(0)})
        assert (edited - plain).abs().max() > 1e-4, site


@pytest.mark.parametrize("encoding", IN_ATTENTION)
def test_hybrid_layers_see_the_encoding_only_where_they_should(encoding, make_decoder, random_tokens):
    tokens = random_tokens()
    hybrid = make_decoder(encoding=encoding, position_layers=(1,))
    none = Decoder(dataclasses.replace(hybrid.config, encoding="none", position_layers=None), seed=None).eval()
    none.load_state_dict({k: v for k, v in hybrid.state_dict().items() if not k.startswith("encoding")})
    site = "blocks.0.hook_resid_post"
    seen = []
    for model in (hybrid, none):
        model(tokens, hooks={site: seen.append})
    torch.testing.assert_close(seen[0], seen[1])
    assert (hybrid(tokens) - none(tokens)).abs().max() > 1e-3
    fused = hybrid(tokens, attention="fused")
    torch.testing.assert_close(fused, hybrid(tokens, attention="explicit"), atol=1e-5, rtol=1e-5)


def test_a_parallel_block_reads_one_stream(make_decoder, random_tokens):
    decoder, tokens, seen = make_decoder(parallel=True), random_tokens(), {}
    assert "blocks.0.hook_resid_mid" not in decoder.config.sites()
    decoder(
        tokens, hooks={site: lambda value, site=site: seen.update({site: value}) for site in decoder.config.sites()}
    )
    for layer, block in enumerate(decoder.layers):
        x, attended, mlp, after = (
            seen[f"blocks.{layer}.hook_{site}"] for site in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        torch.testing.assert_close(mlp, block.mlp(block.mlp_norm(x)))
        torch.testing.assert_close(after, x + attended + mlp)
    with pytest.raises(ProbeError, match="unknown site 'blocks.0.hook_resid_mid'"):
        decoder(tokens, hooks={"blocks.0.hook_resid_mid": lambda value: value})


def test_a_norm_behind_the_embedding(make_decoder, random_tokens):
    decoder, tokens, seen = make_decoder(embedding_norm=True, encoding="learned"), random_tokens(), []
    decoder(tokens, hooks={"hook_embed": seen.append, "blocks.0.hook_resid_pre": seen.append})
    torch.testing.assert_close(seen[0], decoder.embedding_norm(decoder.token_embedding(tokens)))
    torch.testing.assert_close(seen[1], seen[0] + decoder.encoding.weight[:16])


@pytest.mark.parametrize("part", ["norm", "qkv", "attn_out", "mlp"])
def test_biases_are_where_the_config_says(part, make_decoder):
    where = {"norm": "norm", "qkv": ("q_proj", "k_proj", "v_proj"), "attn_out": "o_proj", "mlp": "mlp."}
    names = {name for name in make_decoder().state_dict() if name.endswith(".bias")}
    wanted = where[part] if isinstance(where[part], tuple) else (where[part],)
    of_part = {n for n in names if any(w in n.replace("mlp_norm", "norm") for w in wanted)}
    found = {name for name in make_decoder(bias=(part,)).state_dict() if name.endswith(".bias")}
    assert found == of_part and 0 < len(found) < len(names)


def test_the_seed_decides_the_weights(make_decoder):
    a, b, c = make_decoder(seed=1), make_decoder(seed=1), make_decoder(seed=2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.head.weight, c.head.weight)


# Sums of the sizes of all weights, and of all weights, of the tests' decoder with seed 0.
FIRST_WEIGHTS = {
    "none": (3200.8174672736736, 101.25749274301188),
    "learned": (3217.4762830061504, 100.2175772598689),
    "sinusoidal": (3200.8174672736736, 101.25749274301188),
    "t5": (3220.8993325033175, 99.74804462403836),
    "alibi": (3200.8174672736736, 101.25749274301188),
    "rotary": (3200.8174672736736, 101.25749274301188),
}


@pytest.mark.parametrize(("encoding", "sums"), FIRST_WEIGHTS.items())
def test_the_weights_of_a_seed_are_what_they_have_always_been(encoding, sums, make_decoder):
    weights = torch.cat([p.detach().double().flatten() for p in make_decoder(encoding=encoding).parameters()])
    assert (float(weights.abs().sum()), float(weights.sum())) == pytest.approx(sums, rel=1e-9)


def test_an_encodings_parameters_are_drawn_last_and_by_the_seed_alone(encoding, make_decoder):
    torch.manual_seed(0)
    one = make_decoder(encoding=encoding)
    torch.manual_seed(1)
    two = make_decoder(encoding=encoding)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    without = make_decoder()
    for name, weight in one.state_dict().items():
        assert name.startswith("encoding.") or torch.equal(weight, without.state_dict()[name])


def test_gradients_reach_every_parameter_by_either_path(encoding, make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding=encoding).double(), random_tokens()
    grads = []
    for path in ("explicit", "fused"):
        decoder.zero_grad()
        decoder(tokens, attention=path).log_softmax(-1)[..., 3].sum().backward()
        grads.append({name: p.grad.clone() for name, p in decoder.encoding.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-8, rtol=1e-8)
        assert grad.abs().max() > 1e-6, name


def test_bad_tokens_are_one_clear_line(make_decoder, random_tokens):
    decoder = make_decoder(encoding="learned")
    with pytest.raises(ProbeError, match="32 positions .* reaches position 39"):
        decoder(random_tokens(length=40))
    with pytest.raises(ProbeError, match=r"at least one sequence of one token, got shape \(0, 4\)"):
        decoder(torch.zeros(0, 4, dtype=torch.long))
    with pytest.raises(ProbeError, match="0…18, got 3…19"):
        decoder(torch.tensor([[3, 19]]))
    with pytest.raises(ProbeError, match="unknown site 'blocks.2.hook_resid_post'"):
        decoder(random_tokens(), hooks={"blocks.2.hook_resid_post": lambda v: v})
    with pytest.raises(ProbeError, match="hook them with attention='explicit'"):
        decoder(random_tokens(), hooks={"blocks.0.attn.hook_pattern": lambda v: v}, attention="fused")
    with pytest.raises(ProbeError, match="positions must name all 16 positions"):
        decoder(random_tokens(), positions=torch.arange(3))


def test_import_probe_imports_no_transformer_lens():
    code = "import probe, sys; probe.Decoder, probe.train, probe.to_bridge; print('transformer_lens' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_building_leaves_the_global_generator_alone(make_decoder):
    state = torch.get_rng_state()
    make_decoder(), make_decoder(seed=None)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_first_part_of_a_cache_is_the_cache_of_the_first_part(make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding="t5"), random_tokens()
    whole = KVCache()
    decoder(tokens, cache=whole)
    part = whole.first(9)
    assert (part.length, whole.length) == (9, 16)
    torch.testing.assert_close(decoder(tokens[:, 9:], cache=part), decoder(tokens)[:, 9:], atol=1e-5, rtol=1e-5)
    assert (part.length, whole.length) == (16, 16)


@pytest.mark.parametrize("options", [{}, {"n_kv_heads": 2, "d_head": 6}, {"position_layers": (1,)}], ids=str)
@pytest.mark.parametrize("encoding", ["none", *IN_ATTENTION])
def test_long_masks_are_made_for_some_queries_at_a_time(encoding, options, make_decoder, random_tokens, monkeypatch):
    decoder, tokens, masks = make_decoder(encoding=encoding, **options), random_tokens(length=23), []
    monkeypatch.setattr(decoder_module, "BlockwiseMask", lambda *args: masks.append(args) or BlockwiseMask(*args))
    want = decoder(tokens, attention="explicit")
    assert not masks
    with limits(whole_mask=1, mask_block=4 * 23 * 3):  # rows of 4 heads and 23 keys: three of them
        torch.testing.assert_close(decoder(tokens, attention="fused"), want, atol=1e-5, rtol=1e-5)
    # What reads the content has a row of its own for each of the three sequences.
    without_bias = encoding in ("none", "rotary", "xpos")
    n_block = 1 if decoder.encoding.reads_content else 3
    assert [n for _, n in masks] == ([] if without_bias else [n_block])
    cache = KVCache()
    with limits(whole_mask=1, mask_block=4 * 23 * 3):
        parts = [decoder(tokens[:, a:b], cache=cache, attention="fused") for a, b in [(0, 8), (8, 9), (9, 23)]]
    torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoding", ["t5", "fire", "transformer_xl", "cope"])
def test_gradients_reach_a_bias_that_is_made_in_blocks(encoding, make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding=encoding).double(), random_tokens()
    grads = []
    for path, whole in [("explicit", 2**26), ("fused", 1)]:
        decoder.zero_grad()
        with limits(whole_mask=whole, mask_block=4 * 16 * 5):
            decoder(tokens, attention=path).square().sum().backward()
        grads.append([p.grad.clone() for p in decoder.encoding.parameters()])
    for explicit, fused in zip(*grads, strict=True):
        torch.testing.assert_close(explicit, fused, atol=1e-8, rtol=1e-8)
        assert explicit.abs().max() > 1e-3


def test_rotated_queries_and_keys_make_the_scores(encoding, make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding=encoding, n_kv_heads=2), random_tokens()
    seen = {}
    sites = ["q", "k", "rot_q", "rot_k", "attn_scores"]
    names = {f"blocks.1.attn.hook_{site}": site for site in sites}
    decoder(tokens, hooks={name: lambda value, site=site: seen.update({site: value}) for name, site in names.items()})
    assert seen["rot_q"].shape == seen["q"].shape == (3, 16, 4, 8)
    assert seen["rot_k"].shape == seen["k"].shape == (3, 16, 2, 8)
    q, k = seen["rot_q"].transpose(1, 2), seen["rot_k"].transpose(1, 2).repeat_interleave(2, dim=1)
    scores = q @ k.transpose(-1, -2) * 8**-0.5
    position = decoder.encoding.positions(16, random=False)
    bias = decoder.encoding.bias(position, position, scores)
    if decoder.encoding.reads_content:
        bias = decoder.encoding.content_bias(1, q, k, position, position, 8**-0.5)
    scores = (scores if bias is None else scores + bias).masked_fill(position > position[:, None], -math.inf)
    torch.testing.assert_close(seen["attn_scores"], scores)
    assert torch.equal(seen["rot_q"], seen["q"]) == (encoding not in ("rotary", "xpos"))
    # A rotation keeps lengths; xPos's decay does not.
    if encoding != "xpos":
        torch.testing.assert_close(seen["rot_k"].norm(dim=-1), seen["k"].norm(dim=-1))
