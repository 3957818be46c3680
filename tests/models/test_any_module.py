"""Modules of one's own: a GPT in plain torch is measured as the decoder whose weights it has."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import probe
from probe.attention import attention_summary, census, compare_templates, stream
from probe.errors import ProbeError
from probe.models import layer_encodings, untrained_twin, weights_digest
from probe.position import erase_position, fit_position_probe
from probe.tracing import logits_with_edits

D, HEADS, VOCAB, N = 16, 2, 19, 12


class Attention(nn.Module):
    """Attention by one kernel, or by a softmax written out."""

    def __init__(self, by_hand):
        super().__init__()
        self.qkv, self.out, self.by_hand = nn.Linear(D, 3 * D), nn.Linear(D, D), by_hand

    def forward(self, x):
        batch, n, _ = x.shape
        q, k, v = (t.view(batch, n, HEADS, D // HEADS).transpose(1, 2) for t in self.qkv(x).split(D, 2))
        if self.by_hand:
            scores = q @ k.transpose(2, 3) / math.sqrt(D // HEADS)
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
            z = F.softmax(scores, dim=-1) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).reshape(batch, n, D))


class Block(nn.Module):
    def __init__(self, by_hand):
        super().__init__()
        self.norm_1, self.norm_2, self.attention = nn.LayerNorm(D), nn.LayerNorm(D), Attention(by_hand)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """As nanoGPT is made: a dictionary of parts, a learned table of positions, logits of the last token alone unless
    targets are given."""

    def __init__(self, by_hand=False, positions=True):
        super().__init__()
        blocks = nn.ModuleList(Block(by_hand) for _ in range(3))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(VOCAB, D), "h": blocks, "ln_f": nn.LayerNorm(D)})
        if positions:
            self.transformer["wpe"] = nn.Embedding(2 * N, D)
        self.head = nn.Linear(D, VOCAB, bias=False)

    def forward(self, ids, targets=None):
        x = self.transformer["wte"](ids)
        if "wpe" in self.transformer:
            x = x + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        x = self.transformer["ln_f"](x)
        return (self.head(x if targets is not None else x[:, -1:]), None)


def whole(model, ids):
    return model(ids, targets=ids)[0]


@pytest.fixture(scope="module", params=[False, True], ids=["kernel", "softmax"])
def gpt(request):
    torch.manual_seed(0)
    module = GPT(request.param).eval()
    with torch.no_grad():
        for block in module.transformer["h"]:
            block.attention.qkv.weight.mul_(3)
    return module, probe.wrap(module, blocks="transformer.h.*", call=whole, n_ctx=2 * N)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, VOCAB, (16, N), generator=torch.Generator().manual_seed(1))


def by_hand(module, ids, layer):
    """What one block does, written out: its input, scores, pattern, the stream after attention, its output."""
    with torch.no_grad():
        x = module.transformer["wte"](ids) + module.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in module.transformer["h"][:layer]:
            x = block(x)
        block = module.transformer["h"][layer]
        q, k, _ = block.attention.qkv(block.norm_1(x)).split(D, 2)
        q, k = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (q, k))
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / (D // HEADS) ** 0.5
        scores = scores.where(torch.ones(N, N, dtype=torch.bool).tril(), -torch.inf)
        middle = x + block.attention(block.norm_1(x))
        return x, scores, scores.softmax(-1), middle, block(x)


def test_values_at_every_site_are_those_by_hand(gpt, tokens):
    module, model = gpt
    for layer in range(3):
        before, scores, pattern, middle, after = by_hand(module, tokens, layer)
        traced = probe.trace(model, tokens)
        torch.testing.assert_close(traced.pattern(layer), pattern)
        names = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "attn.hook_attn_scores"]
        at = probe.trace(model, tokens, [f"blocks.{layer}.{name}" for name in names])
        for name, wanted in zip(names, (before, middle, after, scores), strict=True):
            torch.testing.assert_close(at[f"blocks.{layer}.{name}"], wanted)
    assert torch.equal(traced["hook_embed"], module.transformer["wte"](tokens).detach())
    assert torch.equal(model(tokens), whole(module, tokens))
    assert layer_encodings(model) == ["learned"] * 3


def test_edits_reach_the_logits(gpt, tokens):
    module, model = gpt
    uniform = torch.ones(N, N).tril() / torch.arange(1, N + 1)[:, None]
    edited = logits_with_edits(model, tokens, {"blocks.1.attn.hook_pattern": lambda p: uniform.expand_as(p)})
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.transformer["h"][1].attention.qkv.weight[:D] = 0  # queries of 0 make uniform attention
        other.transformer["h"][1].attention.qkv.bias[:D] = 0
    torch.testing.assert_close(edited, whole(other, tokens).detach())
    at_stream = logits_with_edits(model, tokens, {"blocks.1.hook_resid_mid": lambda x: x + 1})
    after = logits_with_edits(model, tokens, {"blocks.2.hook_resid_pre": lambda x: x + 1})
    assert not torch.allclose(at_stream, after) and not torch.allclose(at_stream, model(tokens))
    assert torch.equal(model(tokens), whole(module, tokens))


def test_everything_takes_it(gpt, tokens):
    module, model = gpt
    rows = fit_position_probe(model, tokens, probes=["ridge"], n_bootstrap=20)
    assert {"none", "untrained", "shuffled"} <= set(rows["control"])
    assert set(rows["layer_encoding"].dropna()) == {"learned"}
    assert len(census(model, tokens, n_bootstrap=20).groupby(["layer", "head"])) == 6
    assert len(compare_templates(probe.trace(model, tokens), ["uniform", "alibi_fitted"], n_bootstrap=20)) == 12
    assert erase_position(model, tokens, n_bootstrap=20)["value"].notna().all()
    twin, again = (untrained_twin(model, seed=3) for _ in range(2))
    assert torch.equal(twin(tokens), again(tokens)) and not torch.allclose(twin(tokens), model(tokens))
    assert weights_digest(model) == weights_digest(probe.wrap(module, call=whole)) != weights_digest(twin)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.inner.head.weight.zero_()
    assert not probe.trace(other, tokens)["blocks.0.hook_resid_post"].isnan().any() and not other(tokens).any()
    assert model(tokens).any()


def test_streaming_needs_queries_and_keys(gpt, tokens):
    module, model = gpt
    if module.transformer["h"][0].attention.by_hand:
        with pytest.raises(ProbeError, match="of layer 0 only scores are seen"):
            stream(model, tokens[:2])
        return
    rows = stream(model, tokens[:2]).rows().query("metric == 'entropy'")
    dense = attention_summary(probe.trace(model, tokens[:2]), n_bootstrap=1).query("metric == 'entropy'")
    merged = rows.merge(dense, on=["layer", "head", "query"])
    torch.testing.assert_close(torch.tensor(merged["value_x"]), torch.tensor(merged["value_y"]), atol=1e-5, rtol=1e-5)


def test_without_positions_every_layer_sees_none():
    torch.manual_seed(0)
    assert layer_encodings(probe.wrap(GPT(positions=False).eval(), call=whole)) == ["none"] * 3


def test_what_cannot_be_found_is_said_with_what_to_name():
    torch.manual_seed(0)
    gpt = GPT()
    no_attention = nn.Sequential(nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB))
    drawn = GPT()
    drawn.scale = nn.Parameter(torch.ones(1))
    for call, message in [
        (lambda: probe.wrap(gpt), r"must return logits \(batch, pos, d_vocab\), got \(2, 1, 19\): say how by call="),
        (lambda: probe.wrap(gpt, blocks="blocks.*", call=whole), r"must match the names .* transformer\.h\.\*"),
        (lambda: probe.wrap(gpt, embed="wte", call=whole), "embed must name an nn.Embedding, got 'wte'"),
        (
            lambda: probe.wrap(gpt, blocks="transformer.h.*.mlp", call=whole),
            "none was seen: name its blocks by blocks=",
        ),
        (lambda: probe.wrap(no_attention), "must call scaled_dot_product_attention"),
        (lambda: probe.wrap(nn.Linear(3, 3)), "must embed its tokens by an nn.Embedding"),
        (lambda: probe.wrap("gpt2"), "model must be a torch module or a Trace, got str"),
        (lambda: untrained_twin(probe.wrap(drawn, call=whole)), r"needs wrap\(…, untrained=function of a seed\)"),
        (lambda: probe.trace(gpt, torch.zeros(1, 3, dtype=torch.long)), "or what probe.wrap makes of another module"),
    ]:
        with pytest.raises(ProbeError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    made = probe.wrap(drawn.eval(), call=whole, untrained=lambda seed: GPT())
    assert untrained_twin(made) is not made
