"""What no NoPE decoder can do, whatever its weights: the other side of the constructions.

All in float64, where what is equal by theory is equal to 1e-12 (or to that share of the largest value). Beside each
statement stands the change that makes it false, so that the tests can fail.
"""

import pytest
import torch

from constructions import RelativePosition
from constructions.observing import observe
from probe.models.decoder import Decoder, DecoderConfig

RESID = "blocks.{}.hook_resid_post"
EXACT = {"rtol": 0, "atol": 1e-12}


OPTIONS = {
    "layer norm, gelu": {},
    "rms, swiglu": {"normalization": "rms", "activation": "swiglu", "bias": False},
    "no norm, relu": {"normalization": "none", "activation": "relu"},
}


@pytest.fixture(params=OPTIONS)
def decoder(request) -> Decoder:
    """A decoder without position encoding, every parameter drawn at random, biases too."""
    config = DecoderConfig(d_vocab=11, n_ctx=64, n_layers=3, d_model=24, n_heads=3, **OPTIONS[request.param])
    decoder = Decoder(config, seed=0).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return decoder


def test_constant_tokens_without_bos_have_one_hidden_state(decoder):
    tokens = torch.full((1, 40), 5)
    sites = [site for site in decoder.config.sites() if "resid" in site]
    for site, hidden in observe(decoder, tokens, sites).items():
        spread = (hidden - hidden[:, :1]).abs().max() / hidden.abs().max()
        assert spread <= 1e-12, site
    tokens[:, 0] = 0  # with <bos> every position has a state of its own
    hidden = observe(decoder, tokens, [RESID.format(0)])[RESID.format(0)][0]
    assert torch.pdist(hidden).min() > 1e-5 * hidden.abs().max()


def largest_gradients(decoder: Decoder, tokens: torch.Tensor) -> tuple[float, float]:
    """Of the loss Σ logits²: the largest gradient to any W_Q or W_K, and the largest to any W_V."""
    decoder.zero_grad()
    decoder(tokens).pow(2).sum().backward()
    queries_and_keys = [
        p.weight.grad for layer in decoder.layers for p in (layer.attention.q_proj, layer.attention.k_proj)
    ]
    values = [layer.attention.v_proj.weight.grad for layer in decoder.layers]
    return max(g.abs().max().item() for g in queries_and_keys), max(g.abs().max().item() for g in values)


def test_constant_tokens_leave_uniform_patterns_and_no_gradient_to_queries_and_keys(decoder):
    tokens = torch.full((1, 20), 5)
    uniform = (1 / torch.arange(1, 21, dtype=torch.float64))[:, None].expand(20, 20).tril()
    sites = [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]
    for pattern in observe(decoder, tokens, sites).values():
        torch.testing.assert_close(pattern, uniform.expand_as(pattern), rtol=0, atol=1e-10)
    queries_and_keys, values = largest_gradients(decoder, tokens)
    assert queries_and_keys <= 1e-10 * values
    tokens[:, 0] = 0
    queries_and_keys, values = largest_gradients(decoder, tokens)
    assert queries_and_keys > 1e-4 * values


@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_layer_does_not_see_the_order_of_the_prefix_and_the_second_does(decoder, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 11, (1, 30), generator=generator)
    tokens[:, 0] = 0
    order = torch.cat((torch.randperm(29, generator=generator), torch.tensor([29])))
    first, second = "blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"
    sites = [first, second, RESID.format(0), RESID.format(1)]
    before, after = observe(decoder, tokens, sites), observe(decoder, tokens[:, order], sites)
    torch.testing.assert_close(after[first][:, :, -1], before[first][:, :, -1, order], **EXACT)
    torch.testing.assert_close(after[RESID.format(0)][:, -1], before[RESID.format(0)][:, -1], **EXACT)
    assert (after[second][:, :, -1] - before[second][:, :, -1, order]).abs().max() > 1e-4
    assert (after[RESID.format(1)][:, -1] - before[RESID.format(1)][:, -1]).abs().max() > 1e-4


def test_no_head_of_the_first_layer_tells_equal_tokens_apart(decoder):
    """Barbero et al. 2025, Proposition 5.2: on [bos, x, x] neither x gets half of the last row, so there is no diagonal
    and no previous-token head."""
    for x in range(1, 11):
        last = observe(decoder, torch.tensor([[0, x, x]]), ["blocks.0.attn.hook_pattern"])
        last = last["blocks.0.attn.hook_pattern"][0, :, -1]
        torch.testing.assert_close(last[:, 1], last[:, 2], **EXACT)
        assert (last[:, 1] < 0.5).all()


def test_a_head_of_the_second_layer_can():
    """With Theorem 2 and a slope of 1 the same tokens get weights in the ratio e : 1, and the nearer one beats 1/2."""
    decoder = RelativePosition(torch.ones(4)).build(3)
    for x in range(1, 11):
        last = observe(decoder, torch.tensor([[0, x, x]]), ["blocks.1.attn.hook_pattern"])
        last = last["blocks.1.attn.hook_pattern"][0, :, -1]
        torch.testing.assert_close(last[:, 2] / last[:, 1], torch.e * torch.ones(4, dtype=torch.float64))
        assert last[:, 2].max() > 0.5
