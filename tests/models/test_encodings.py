import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from probe.errors import ProbeError
from probe.models.encodings import ENCODINGS, RelativeBias, alibi_slopes, make_encoding, rotate, t5_bucket
from probe.models.encodings.randomized import POSITIONAL

DIMS = {"d_model": 16, "n_heads": 4, "d_head": 8, "n_ctx": 64, "n_layers": 2}
LIKE = torch.zeros((), dtype=torch.float64)


@pytest.fixture(params=ENCODINGS)
def encoding(request):
    made = make_encoding(request.param, {}, **DIMS).double()
    made.reset_parameters(torch.Generator().manual_seed(0))
    return made


def test_alibi_slopes_are_those_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-k for k in range(1, 9)]
    powers = [-1, -2, -3, -4, -5, -6, -7, -8, -0.5, -1.5, -2.5, -3.5]
    assert alibi_slopes(12).tolist() == pytest.approx([2.0**p for p in powers], rel=1e-15)


@pytest.mark.parametrize("n_heads", [1, 2, 3, 5, 8, 12, 16, 20])
def test_alibi_slopes_are_those_of_hugging_face(n_heads):
    # BLOOM's tensor is slope × key position.
    bias = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), n_heads, torch.float32)
    torch.testing.assert_close(alibi_slopes(n_heads).float(), bias[:, 0, 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 20), (16, 1000), (2, 2), (2, 9), (3, 7)])
def test_t5_buckets_are_those_of_hugging_face(n_buckets, max_distance):
    distance = torch.arange(-5, 2000)
    theirs = T5Attention._relative_position_bucket(
        -distance, bidirectional=False, num_buckets=n_buckets, max_distance=max_distance
    )
    assert torch.equal(t5_bucket(distance, n_buckets, max_distance), theirs)


def test_t5_buckets_start_where_the_paper_says():
    bucket = t5_bucket(torch.arange(300)).tolist()
    assert bucket[:16] == list(range(16))
    starts = {16: 16, 17: 19, 18: 21, 19: 24, 20: 27, 21: 31, 24: 46, 31: 113}
    assert {b: bucket.index(b) for b in starts} == starts
    assert bucket[-1] == 31


def test_sinusoids_are_those_of_vaswani():
    sinusoidal = make_encoding("sinusoidal", {}, **DIMS)
    x = torch.zeros(1, 5, 16, dtype=torch.float64)
    table = sinusoidal.embed(x, torch.arange(5))[0]
    for p in range(5):
        for i in range(8):
            angle = p / 10000 ** (2 * i / 16)
            assert table[p, 2 * i] == pytest.approx(math.sin(angle), abs=1e-15)
            assert table[p, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-15)


def test_rotation_is_that_of_llama():
    rotary = make_encoding("rotary", {}, **DIMS)
    q, k = torch.randn(2, 2, 4, 6, 8, dtype=torch.float64)
    rotation = rotary.rotation(torch.arange(6), LIKE)
    frequencies = 1 / 10000 ** (np.arange(0, 8, 2) / 8)
    angle = torch.from_numpy(np.outer(np.arange(6), np.concatenate([frequencies, frequencies])))[None]
    theirs_q, theirs_k = apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    torch.testing.assert_close(rotate(q, rotation), theirs_q)
    torch.testing.assert_close(rotate(k, rotation), theirs_k)


def test_alibi_bias_is_a_literal_matrix():
    bias = make_encoding("alibi", {}, **DIMS).bias(torch.arange(3), torch.arange(3), LIKE)
    # Four heads: slopes 2^-2, 2^-4, 2^-6, 2^-8; future keys are hidden later, by the causal mask.
    assert bias[0].tril().tolist() == [[0, 0, 0], [-0.25, 0, 0], [-0.5, -0.25, 0]]
    assert bias[3].tril().tolist() == [[0, 0, 0], [-1 / 256, 0, 0], [-2 / 256, -1 / 256, 0]]


def test_t5_bias_is_the_table_at_the_bucket():
    t5 = make_encoding("t5", {}, **DIMS).double()
    t5.reset_parameters(torch.Generator().manual_seed(0))
    query, key = torch.arange(20, 240), torch.arange(240)
    bias = t5.bias(query, key, LIKE)
    for q in (20, 33, 39, 113, 239):
        for k in (0, 5, 20):
            bucket = T5Attention._relative_position_bucket(torch.tensor([k - q]), False, 32, 128)
            torch.testing.assert_close(bias[:, q - 20, k], t5.weight[bucket.item()])


def test_t5_gradient_counts_each_bucket():
    t5 = make_encoding("t5", {}, **DIMS)
    t5.reset_parameters()
    t5.bias(torch.arange(30), torch.arange(30), t5.weight).sum().backward()
    distance = torch.arange(30)[:, None] - torch.arange(30)
    counts = torch.bincount(t5_bucket(distance).flatten(), minlength=32)
    assert torch.equal(t5.weight.grad, counts[:, None].expand(-1, 4).float())


def test_a_relative_bias_has_to_say_what_it_is():
    with pytest.raises(NotImplementedError):
        RelativeBias(**DIMS).bias(torch.arange(3), torch.arange(3), LIKE)


def test_all_keep_their_places():
    # The seeds of a study go by them.
    names = "none learned sinusoidal t5 alibi rotary alibi_learned transformer_xl fire kerple sandwich xpos cope"
    assert list(ENCODINGS) == [*names.split(), "randomized", "alibi_keys"]


def test_an_encoding_says_where_it_acts(encoding):
    x = torch.zeros(1, 5, 16, dtype=torch.float64)
    assert encoding.embeds == bool((encoding.embed(x, torch.arange(5)) != 0).any())
    q, positions = torch.zeros(1, 4, 5, 8, dtype=torch.float64), torch.arange(5)
    if encoding.reads_content:
        assert encoding.content_bias(1, q, q, positions, positions, 1.0).shape == (1, 4, 5, 5)
    else:
        with pytest.raises(NotImplementedError):
            encoding.content_bias(1, q, q, positions, positions, 1.0)


@pytest.mark.parametrize("name", [*POSITIONAL, "none", "cope", "alibi_keys"])
def test_an_encoding_says_how_far_it_knows_positions(name):
    encodings = [make_encoding(name, {}, **DIMS)]
    if name in POSITIONAL:
        encodings.append(make_encoding("randomized", {"base": name, "max_position": 64}, **(DIMS | {"n_ctx": 40})))
    for encoding in encodings:
        assert encoding.last_position == (63 if name == "learned" else None)
        far = torch.tensor([0, 63])
        x = torch.zeros(1, 2, 16)
        encoding.embed(x, far)
        if name == "learned":
            with pytest.raises(ProbeError, match="has 64 positions .* reaches position 64"):
                encoding.embed(x, far + 1)
        else:
            encoding.embed(x, far + 10**6)


@pytest.mark.parametrize(
    ("name", "parameter", "std"),
    [
        ("learned", "weight", 0.02),  # GPT-2's
        ("t5", "weight", 1 / 8),  # T5's, d_model^-1/2
        ("transformer_xl", "W_R", 1 / 8),
        ("transformer_xl", "u", 0.02),  # Transformer-XL's init_std
        ("transformer_xl", "v", 0.02),
    ],
)
def test_first_draws_are_normal(name, parameter, std):
    dims = DIMS | {"d_model": 64, "n_heads": 64, "d_head": 64}
    encoding = make_encoding(name, {}, **dims)
    encoding.reset_parameters(torch.Generator().manual_seed(0))
    drawn = getattr(encoding, parameter).detach().numpy().ravel()
    assert kstest(drawn / std, "norm").pvalue > 0.01


def test_every_encoding_answers_in_the_dtype_that_is_asked(encoding):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        like = torch.zeros((), dtype=dtype)
        encoding.to(dtype)
        assert encoding.embed(torch.zeros(1, 4, 16, dtype=dtype), torch.arange(4)).dtype == dtype
        positions, q = torch.arange(4), torch.zeros(1, 4, 4, 8, dtype=dtype)
        values = [encoding.bias(positions, positions, like), encoding.decay(positions, like)]
        values += encoding.rotation(positions, like) or ()
        if encoding.reads_content:
            values.append(encoding.content_bias(0, q, q, positions, positions, 1.0))
        assert all(value is None or value.dtype == dtype for value in values)


def test_bad_input_is_one_clear_line():
    with pytest.raises(ProbeError, match="unknown encoding 'rope'; known: alibi, alibi_keys, alibi_learned, cope"):
        make_encoding("rope", {}, **DIMS)
    with pytest.raises(ProbeError, match="'t5' has no option 'buckets'; it has: n_buckets, max_distance"):
        make_encoding("t5", {"buckets": 3}, **DIMS)
    with pytest.raises(ProbeError, match="'alibi' has no option 'base'; it has: none"):
        make_encoding("alibi", {"base": 3}, **DIMS)
    with pytest.raises(ProbeError, match="n_heads must be at least 1, got 0"):
        alibi_slopes(0)
    with pytest.raises(ProbeError, match="got 32 and 16"):
        t5_bucket(torch.arange(3), 32, 16)
    with pytest.raises(ProbeError, match="even d_head · fraction, got 7 · 1"):
        make_encoding("rotary", {}, **(DIMS | {"d_head": 7}))
    with pytest.raises(ProbeError, match="even d_model, got 15"):
        make_encoding("sinusoidal", {}, **(DIMS | {"d_model": 15}))
    with pytest.raises(ProbeError, match="base must be a number above 0, got 0"):
        make_encoding("sinusoidal", {"base": 0}, **DIMS)
    with pytest.raises(ProbeError, match="want n_buckets >= 2 and max_distance > n_buckets // 2, got 1 and 128"):
        make_encoding("t5", {"n_buckets": 1}, **DIMS)
    with pytest.raises(ProbeError, match="got 32 and 16"):
        make_encoding("t5", {"max_distance": 16}, **DIMS)
    with pytest.raises(ProbeError, match="max_distance must be an integer of at least 1, got True"):
        make_encoding("t5", {"max_distance": True}, **DIMS)


@pytest.mark.parametrize("dimension", DIMS)
def test_dimensions_are_no_options(dimension):
    with pytest.raises(ProbeError, match=f"'none' has no option '{dimension}'; it has: none"):
        make_encoding("none", {dimension: 3}, **DIMS)


def test_where_no_number_of_layers_is_named_there_is_one():
    dims = {name: size for name, size in DIMS.items() if name != "n_layers"}
    assert len(make_encoding("transformer_xl", {}, **dims).W_R) == len(make_encoding("cope", {}, **dims).embedding) == 1
