import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb

from probe.errors import ProbeError
from probe.models.encodings import make_encoding, rotate
from probe.models.lens import to_bridge

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
    odd = make_encoding("xpos", {"scale_base": 16}, **(DIMS | {"n_ctx": 65}))
    assert torch.equal(odd.decay(positions, LIKE), decay)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_xpos_leaves_half_of_the_dtypes_range_to_queries_and_keys(dtype):
    # The steepest plane's ζ is 0.4/1.4 for every 512 tokens; the middle is at 32.
    furthest = 32 + int(512 * np.log(torch.finfo(dtype).max) / 2 / np.log(1.4 / 0.4))
    encoding, like = make_encoding("xpos", {}, **DIMS), torch.zeros((), dtype=dtype)
    factors = encoding.decay(torch.tensor([32, furthest]), like)
    assert (factors[0] == 1).all()
    assert float(factors[1].min().double().log()) == pytest.approx(-np.log(torch.finfo(dtype).max) / 2, rel=1e-3)
    with pytest.raises(ProbeError, match=f"at positions 32…{furthest + 1} leave the range"):
        encoding.decay(torch.tensor([32, furthest + 1]), like)


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


EXTENSIONS = ["linear", "ntk", "yarn", "llama3"]


def hugging_face(scaling, factor, base, fraction, length):
    """Hugging Face's inverse frequencies and attention factor, for heads of 64 dimensions."""
    # Their "dynamic" rule stretches the base as NTK-aware interpolation does, by the length of the sequence.
    name = {"ntk": "dynamic"}.get(scaling, scaling)
    parameters = {
        "rope_type": name,
        "rope_theta": base,
        "partial_rotary_factor": fraction,
        "factor": 1.0 if name == "dynamic" else factor,
        "original_max_position_embeddings": length,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    of_kind = {"linear": (), "dynamic": (), "yarn": ("original",), "llama3": ("original", "low", "high")}[name]
    always = ("rope_type", "rope_theta", "partial", "factor")
    parameters = {k: v for k, v in parameters.items() if k.startswith((*always, *of_kind))}
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=length, rope_parameters=parameters
    )
    return ROPE_INIT_FUNCTIONS[name](config, "cpu", seq_len=int(factor * length))


@pytest.mark.parametrize("scaling", EXTENSIONS)
@pytest.mark.parametrize("fraction", [0.25, 1.0])
@pytest.mark.parametrize(("base", "length", "factor"), [(10000.0, 64, 4.0), (10000.0, 2048, 2.0), (5e5, 8192, 8.0)])
def test_context_extensions_are_those_of_hugging_face(scaling, fraction, base, length, factor):
    frequencies, attention_factor = hugging_face(scaling, factor, base, fraction, length)
    options = {"base": base, "fraction": fraction, "scaling": scaling, "factor": factor}
    dims = DIMS | {"d_head": 64, "n_ctx": length}
    encoding = make_encoding("rotary", options, **dims)
    assert encoding.frequencies.dtype == torch.float64
    torch.testing.assert_close(encoding.frequencies.float(), frequencies, rtol=2e-6, atol=0)
    assert encoding.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    named = make_encoding("rotary", options | {"trained_length": length}, **(dims | {"n_ctx": 17}))
    assert torch.equal(named.frequencies, encoding.frequencies)
    # It changes something, and the fastest plane less than the slowest.
    plain = make_encoding("rotary", {"base": base, "fraction": fraction}, **dims).frequencies
    slowed = plain / encoding.frequencies
    assert slowed[-1] == pytest.approx(factor) and slowed[0] == pytest.approx(factor if scaling == "linear" else 1)


def of_transformers(kind, **parameters):
    """transformers' frequencies and attention factor of a kind of scaling, for heads of 64 dimensions."""
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=4096,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0} | parameters,
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=4096)


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        (
            "yarn",
            {"factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 20.0, "beta_slow": 2.5},
            {"factor": 4.0, "trained_length": 1024, "beta_fast": 20.0, "beta_slow": 2.5},
        ),
        (
            "yarn",
            {"factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 0.7},
            {"factor": 4.0, "trained_length": 1024, "attention_factor": 0.7},
        ),
        (
            "longrope",
            {
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
                "short_factor": [1.0] * 32,
                "long_factor": [1 + j / 8 for j in range(32)],
            },
            {"factor": 4.0, "trained_length": 1024, "plane_factors": [1 + j / 8 for j in range(32)]},
        ),
        ("proportional", {"partial_rotary_factor": 0.25}, {"proportion": 0.25}),
        ("proportional", {"partial_rotary_factor": 0.7}, {"proportion": 0.7}),
    ],
)
def test_further_scalings_are_those_of_transformers(kind, theirs, ours):
    frequencies, attention_factor = of_transformers(kind, **theirs)
    scaling = {} if kind == "proportional" else {"scaling": kind}
    encoding = make_encoding("rotary", ours | scaling, **(DIMS | {"d_head": 64}))
    torch.testing.assert_close(encoding.frequencies.float(), frequencies, rtol=2e-6, atol=0)
    assert encoding.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_options_of_another_scaling_are_refused(make_decoder):
    for options, message in [
        ({"beta_fast": 3.0}, "beta_fast is an option of yarn, got scaling 'none'"),
        ({"scaling": "linear", "attention_factor": 2.0}, "attention_factor is an option of yarn and longrope"),
        ({"scaling": "yarn", "beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast must be at least beta_slow, got 1 and 2"),
        ({"scaling": "longrope", "plane_factors": [1.0]}, "plane_factors must be one for each of 4 planes, got 1"),
        ({"proportion": 1.5}, "proportion must be a number above 0 and at most 1, got 1.5"),
    ]:
        with pytest.raises(ProbeError, match=message):
            make_decoder(encoding="rotary", encoding_options=options)


@pytest.mark.parametrize(
    ("base", "length"),
    [(1.5, 64), (2.0, 4096), (10000.0, 6)],
    ids=["a ramp that does not end", "no plane as it was", "a step in place of the ramp"],
)
def test_yarns_ramp_is_that_of_hugging_face_at_its_ends(base, length):
    frequencies, _ = hugging_face("yarn", 4.0, base, 1.0, length)
    encoding = make_encoding(
        "rotary", {"base": base, "scaling": "yarn", "factor": 4.0}, **(DIMS | {"d_head": 64, "n_ctx": length})
    )
    torch.testing.assert_close(encoding.frequencies.float(), frequencies, rtol=2e-6, atol=0)


def test_yarn_lengthens_what_is_turned_and_nothing_else():
    options = {"fraction": 0.5, "scaling": "yarn", "factor": 4}
    rotation = make_encoding("rotary", options, **DIMS).rotation(torch.arange(6), LIKE)
    x = torch.randn(1, 4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rotation)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    ratio = turned[..., :4].norm(dim=-1) / x[..., :4].norm(dim=-1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.1386294361119891))  # 0.1 ln 4 + 1


@pytest.mark.parametrize("scaling", EXTENSIONS)
@pytest.mark.parametrize("d_head", [2, 8, 64])
def test_a_factor_of_1_is_the_plain_rotation(scaling, d_head):
    dims = DIMS | {"d_head": d_head}
    plain = make_encoding("rotary", {}, **dims).rotation(torch.arange(100), LIKE)
    extended = make_encoding("rotary", {"scaling": scaling, "factor": 1}, **dims).rotation(torch.arange(100), LIKE)
    assert all(torch.equal(a, b) for a, b in zip(plain, extended, strict=True))


@pytest.mark.parametrize("scaling", EXTENSIONS)
@pytest.mark.parametrize("encoding", ["rotary", "randomized"])
def test_extended_decoders_are_causal_and_see_distances_alone(scaling, encoding, make_decoder, random_tokens):
    options = {"scaling": scaling, "factor": 4.0}
    if encoding == "randomized":
        options = {"base": "rotary", "base_options": options, "max_position": 99}
    decoder = make_decoder(encoding=encoding, encoding_options=options).double()
    tokens = random_tokens()
    logits, changed = decoder(tokens), tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 19
    torch.testing.assert_close(decoder(changed)[:, :9], logits[:, :9], atol=1e-12, rtol=0)
    positions = decoder.own_positions(16)
    torch.testing.assert_close(decoder(tokens, positions=positions + 50), logits, atol=1e-10, rtol=0)
    torch.testing.assert_close(decoder(tokens, attention="fused"), logits, atol=1e-10, rtol=0)
    assert (make_decoder(encoding="rotary").double()(tokens) - logits).abs().max() > 1e-3
    bridge = to_bridge(decoder.float())
    torch.testing.assert_close(bridge(tokens), decoder(tokens), atol=1e-5, rtol=1e-5)


def test_bad_scalings_are_one_clear_line(make_decoder):
    def bad(message, **options):
        with pytest.raises(ProbeError, match=message):
            make_decoder(encoding="rotary", encoding_options=options)

    bad("unknown scaling of rotary positions 'pi'; known: linear, llama3, longrope, none, ntk, yarn", scaling="pi")
    bad("factor must be a number at least 1 and below 1e.09, got 0.5", scaling="yarn", factor=0.5)
    bad("a factor wants a scaling other than 'none', got factor 2 without one", factor=2.0)
    bad("trained_length must be an integer of at least 1, got 0", scaling="yarn", trained_length=0)
    bad("factor must be a number at least 1 and below 1e.09, got 1000000000.0", scaling="yarn", factor=1e9)
    bad("yarn wants a base above 1, got 0.5", scaling="yarn", factor=2, base=0.5)
    bad("yarn wants a base above 1, got 1", scaling="yarn", factor=2, base=1)
    with pytest.raises(ProbeError, match="'xpos' has no option 'scaling'; it has: base, scale_base"):
        make_decoder(encoding="xpos", encoding_options={"scaling": "yarn"})
