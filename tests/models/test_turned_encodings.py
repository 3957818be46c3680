import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb

from probe.errors import ProbeError
from probe.models.encodings import make_encoding, rotate

DIMS = {"d_model": 32, "n_heads": 4, "d_head": 8, "n_ctx": 64, "n_layers": 2}
LIKE = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
def test_partial_rotation_is_that_of_gpt_neox(fraction):
    encoding = make_encoding("rotary", {"fraction": fraction}, **DIMS)
    q, k = torch.randn(2, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    config = GPTNeoXConfig(
        hidden_size=32,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": fraction},
    )
    cos, sin = GPTNeoXRotaryEmbedding(config)(q, torch.arange(6)[None])
    theirs_q, theirs_k = apply_rotary_pos_emb(q, k, cos, sin)
    rotation = encoding.rotation(torch.arange(6), q)
    torch.testing.assert_close(rotate(q, rotation), theirs_q)
    torch.testing.assert_close(rotate(k, rotation), theirs_k)
    width = int(8 * fraction)
    assert torch.equal(rotate(q, rotation)[..., width:], q[..., width:])


def test_xpos_is_rotary_with_a_decay_of_each_plane():
    # Planes as complex numbers: q times e^(iθn) ζ^(n/b), k times e^(iθm) ζ^(-m/b), and the real part of q times k*.
    encoding = make_encoding("xpos", {"scale_base": 16}, **DIMS)
    generator = np.random.default_rng(0)
    q, k = generator.normal(size=(2, 30, 8))
    wanted = np.zeros((30, 30))
    for n in range(30):
        for m in range(n + 1):
            for i in range(4):
                theta, zeta = 10000 ** (-2 * i / 8), (2 * i / 8 + 0.4) / 1.4
                a, b = complex(q[n, i], q[n, i + 4]), complex(k[m, i], k[m, i + 4])
                wanted[n, m] += (a * b.conjugate() * np.exp(1j * theta * (n - m))).real * zeta ** ((n - m) / 16)
    positions = torch.arange(30)
    rotation, decay = encoding.rotation(positions, LIKE), encoding.decay(positions, LIKE)
    turned_q, turned_k = (rotate(torch.from_numpy(x)[None, None], rotation)[0, 0] for x in (q, k))
    products = (turned_q * decay) @ (turned_k / decay).T
    np.testing.assert_allclose(products.tril().numpy(), wanted, rtol=1e-10, atol=1e-12)
    # The released code's numbers: (arange(0, d, 2) + 0.4 d) / 1.4 d to the position from the middle over the base.
    scale = (np.arange(0, 8, 2) + 0.4 * 8) / (1.4 * 8)
    np.testing.assert_allclose(decay[:, :4].numpy(), scale ** ((np.arange(30)[:, None] - 32) / 16), rtol=1e-12)


def test_xpos_refuses_positions_that_leave_the_range_of_the_dtype(make_decoder, random_tokens):
    decoder = make_decoder(encoding="xpos")
    far = torch.arange(50_000, 50_016)
    with pytest.raises(ProbeError, match="xpos factors at positions 50000…50015 leave the range of torch.float32"):
        decoder(random_tokens(), positions=far)
    near = decoder.double()(random_tokens())
    torch.testing.assert_close(decoder(random_tokens(), positions=far), near, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, True, float("nan")])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(ProbeError, match="fraction must be a number above 0"):
        make_encoding("rotary", {"fraction": fraction}, **DIMS)


def test_bad_options_are_one_clear_line(make_decoder):
    with pytest.raises(ProbeError, match="even d_head · fraction, got 8 · 0.3"):
        make_decoder(encoding="rotary", encoding_options={"fraction": 0.3})
    with pytest.raises(ProbeError, match="even d_head · fraction, got 8 · 0.125"):
        make_decoder(encoding="rotary", encoding_options={"fraction": 0.125})
    with pytest.raises(ProbeError, match="base must be a number above 0, got 0"):
        make_decoder(encoding="rotary", encoding_options={"base": 0})
    with pytest.raises(ProbeError, match="scale_base must be a number above 0, got -1"):
        make_decoder(encoding="xpos", encoding_options={"scale_base": -1})
    with pytest.raises(ProbeError, match="'xpos' has no option 'fraction'; it has: base, scale_base"):
        make_decoder(encoding="xpos", encoding_options={"fraction": 0.5})
