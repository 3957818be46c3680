import math

import numpy as np
import pytest
import torch
from transformers import XLNetConfig
from transformers.models.xlnet.modeling_xlnet import XLNetModel, XLNetRelativeAttention

from probe.errors import ProbeError
from probe.models.encodings import make_encoding

DIMS = {"d_model": 16, "n_heads": 4, "d_head": 8, "n_ctx": 64, "n_layers": 2}
SCALE = 0.3


def made(name, **options):
    encoding = make_encoding(name, options, **DIMS).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in encoding.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return encoding


def random_qk(n_query, n_key):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, 4, n, 8, generator=generator, dtype=torch.float64) for n in (n_query, n_key))


def content_bias(encoding, q, k, query, key, layer=1):
    """Where keys are visible, 0 elsewhere."""
    bias = encoding.content_bias(layer, q, k, query, key, SCALE).detach()
    assert bias.isfinite().all()
    return bias.tril(len(key) - len(query)).numpy()


POSITIONS = {
    "in order": (torch.arange(11), torch.arange(11)),
    "cached": (torch.arange(7, 11), torch.arange(11)),
    "one query": (torch.tensor([10]), torch.arange(11)),
    "from 100 on": (torch.arange(100, 111), torch.arange(100, 111)),
    "scattered": (torch.tensor([9, 30, 31]), torch.tensor([0, 4, 5, 9, 30, 31])),
    "every other": (torch.arange(0, 22, 2), torch.arange(0, 22, 2)),
}


@pytest.mark.parametrize(("query", "key"), POSITIONS.values(), ids=POSITIONS)
def test_transformer_xl_is_the_papers_formula(query, key):
    encoding = made("transformer_xl")
    q, k = random_qk(len(query), len(key))
    W_R, u, v = (p.detach().numpy() for p in (encoding.W_R[1], encoding.u, encoding.v))
    wanted = np.zeros((2, 4, len(query), len(key)))
    for i, at in enumerate(query.tolist()):
        for j, other in enumerate(key.tolist()):
            if other <= at:
                r = np.zeros(16)
                for m in range(8):
                    angle = (at - other) / 10000 ** (2 * m / 16)
                    r[2 * m], r[2 * m + 1] = math.sin(angle), math.cos(angle)
                for b in range(2):
                    for h in range(4):
                        to_key, to_distance = u[h] @ k[b, h, j].numpy(), (q[b, h, i].numpy() + v[h]) @ W_R[h] @ r
                        wanted[b, h, i, j] = SCALE * (to_key + to_distance)
    np.testing.assert_allclose(content_bias(encoding, q, k, query, key), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("place", POSITIONS)
def test_transformer_xl_makes_one_vector_a_distance_where_positions_are_in_order(place, monkeypatch):
    encoding, (query, key) = made("transformer_xl"), POSITIONS[place]
    in_order = place not in ("scattered", "every other")
    monkeypatch.setattr(encoding, "_scattered" if in_order else "_shifted", None, raising=False)
    content_bias(encoding, *random_qk(len(query), len(key)), query, key)


def test_cope_starts_as_nope_with_64_positions():
    encoding = make_encoding("cope", {}, **DIMS)
    encoding.reset_parameters(torch.Generator().manual_seed(0))
    assert torch.equal(encoding.embedding, torch.zeros(2, 64, 8))


def test_transformer_xl_is_hugging_faces_relative_attention():
    # XLNet took it over, and with it the sinusoids' order of the released code: all sines before all cosines.
    encoding, n = made("transformer_xl"), 9
    q, k = random_qk(n, n)
    theirs = XLNetRelativeAttention(XLNetConfig(d_model=32, n_head=4, dropout=0.0)).double()
    angles = XLNetModel.positional_embedding(
        torch.arange(n, -1, -1.0).double(), 1 / 10000 ** (torch.arange(0, 16, 2.0).double() / 16)
    )
    W_R = encoding.W_R[0].unflatten(-1, (8, 2)).transpose(-1, -2).flatten(-2)
    with torch.no_grad():
        theirs.r_w_bias.copy_(encoding.u), theirs.r_r_bias.copy_(encoding.v)
        future = torch.ones(n, n).double().triu(1)[:, :, None, None].expand(-1, -1, 2, 4)
        k_head_r = torch.einsum("tbm,hdm->tbhd", angles, W_R).expand(-1, 2, -1, -1)
        q_head, k_head = (x.permute(2, 0, 1, 3) for x in (q, k))
        _, pattern = theirs.rel_attn_core(q_head, k_head, k_head, k_head_r, attn_mask=future, output_attentions=True)
        position = torch.arange(n)
        scores = 8**-0.5 * q @ k.transpose(-1, -2) + encoding.content_bias(0, q, k, position, position, 8**-0.5)
        ours = scores.masked_fill(future[:, :, 0, 0] == 1, -math.inf).softmax(-1)
    torch.testing.assert_close(ours, pattern.permute(2, 3, 0, 1))


@pytest.mark.parametrize("npos_max", [64, 3, 1])
@pytest.mark.parametrize(("query", "key"), list(POSITIONS.values())[:3], ids=list(POSITIONS)[:3])
def test_cope_is_the_papers_formula(query, key, npos_max):
    encoding = made("cope", npos_max=npos_max)
    q, k = random_qk(len(query), len(key))
    e, past = encoding.embedding[1].detach().numpy(), len(key) - len(query)
    wanted = np.zeros((2, 4, len(query), len(key)))
    for b in range(2):
        for h in range(4):
            for i in range(len(query)):
                gates = [1 / (1 + math.exp(-SCALE * float(q[b, h, i] @ k[b, h, m]))) for m in range(past + i + 1)]
                for j in range(past + i + 1):
                    p = min(sum(gates[j:]), npos_max - 1)
                    low, high = e[math.floor(p)], e[math.ceil(p)]
                    wanted[b, h, i, j] = q[b, h, i].numpy() @ (
                        (p - math.floor(p)) * high + (1 - p + math.floor(p)) * low
                    )
    np.testing.assert_allclose(content_bias(encoding, q, k, query, key), wanted, rtol=1e-9, atol=1e-12)


def test_cope_counts_what_its_gates_let_in():
    # Keys of large positive product are counted, those of large negative product are not: p is their number.
    encoding = made("cope", npos_max=9)
    counted = torch.tensor([1, 0, 0, 1, 1, 0, 1], dtype=torch.float64)
    q = torch.full((1, 4, 1, 8), 100.0, dtype=torch.float64)
    k = (2 * counted - 1)[None, None, :, None].expand(1, 4, -1, 8)
    bias = encoding.content_bias(0, q, k, torch.tensor([6]), torch.arange(7), SCALE)
    p = torch.tensor([4, 3, 3, 3, 2, 1, 1])
    torch.testing.assert_close(bias, (q @ encoding.embedding[0].T).gather(-1, p.expand(1, 4, 1, -1)))


def test_copes_positions_are_counted_in_float32_even_where_the_decoder_is_in_bfloat16():
    encoding = made("cope", npos_max=600).bfloat16()
    with torch.no_grad():
        encoding.embedding.copy_(torch.arange(600.0)[:, None] / 64)
    n = 500
    q, k = (torch.zeros(1, 4, n, 8, dtype=torch.bfloat16) for _ in range(2))
    q[..., 0] = 1  # with keys 0 every gate is a half, and position n is n/2
    bias = encoding.content_bias(0, q, k, torch.arange(n), torch.arange(n), SCALE)
    assert bias.dtype == torch.bfloat16
    torch.testing.assert_close(bias[0, 0, -1, 0].float(), torch.tensor(n / 2 / 64), rtol=2**-7, atol=0)


def test_bad_options_are_one_clear_line(make_decoder):
    with pytest.raises(ProbeError, match="npos_max must be an integer of at least 1, got 0"):
        make_decoder(encoding="cope", encoding_options={"npos_max": 0})
    with pytest.raises(ProbeError, match="transformer_xl positions want an even d_model, got 33"):
        make_decoder(encoding="transformer_xl", d_model=33, d_head=8)
