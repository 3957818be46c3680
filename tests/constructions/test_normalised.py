import pytest
import torch
from scipy.stats import kstest

from constructions import CONSTRUCTIONS, AbsolutePosition, ExactPosition, Newton, ThroughNorm
from constructions.observing import observe
from probe.errors import ProbeError
from probe.models.decoder import Decoder

LENGTH = 200


@pytest.fixture(params=["rms", "layer"])
def construction(request) -> ThroughNorm:
    return CONSTRUCTIONS[f"exact_position_through_{request.param}_norm"]


def streams(construction: ThroughNorm, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """After each layer: ours, in the inner rows, and the inner construction's."""
    sites = [f"blocks.{layer}.hook_resid_post" for layer in range(construction.layers)]
    tokens = construction.tokens(LENGTH)
    ours = observe(construction.build(LENGTH, dtype), tokens, sites)
    theirs = observe(construction.inner.build(LENGTH, dtype), tokens, sites)
    ours = torch.stack([construction.stream(ours[site][0], LENGTH) for site in sites])
    return ours, torch.stack([theirs[site][0] for site in sites])


def test_the_norm_is_a_power_of_two(construction):
    """RMSNorm to the last bit, LayerNorm to a few epsilon, its mean 0 to the last bit."""
    decoder = construction.build(LENGTH, torch.float32)
    sites = ["hook_embed", "blocks.0.hook_resid_mid", "blocks.0.hook_resid_post"]
    for stream in observe(decoder, construction.tokens(LENGTH), sites).values():
        x = stream.float()
        with torch.no_grad():
            y = decoder.layers[1].attention_norm(x)
        ratio = (y / x)[x != 0]
        scale = 2.0 ** ratio[0].log2().round()
        if construction.normalization == "rms":
            assert (ratio == scale).all()
        assert (ratio / scale - 1).abs().max() <= 2e-6
        first, second = y[0].chunk(2, dim=-1)
        assert first.equal(-second)


def test_it_computes_the_same_numbers(construction):
    ours, theirs = streams(construction, torch.float32)
    content = construction.inner.layout(LENGTH).content
    written = slice(0, content.start)
    torch.testing.assert_close(ours[..., written], theirs[..., written], rtol=3e-6, atol=3e-6)
    # The heads and units beside it are at work: the content moves by what it is.
    assert ((ours - theirs)[..., content].abs().mean() > 0.3).all()


def test_the_stream_is_mirrored(construction):
    decoder = construction.build(LENGTH, torch.float32)
    sites = [f"blocks.{layer}.hook_resid_{at}" for layer in range(construction.layers) for at in ("mid", "post")]
    for stream in observe(decoder, construction.tokens(LENGTH), sites).values():
        first, second = stream[0].chunk(2, dim=-1)
        assert first.equal(-second) and first[:, 0].unique().numel() == 1


def test_dropped_in_as_it_is_the_theorem_fails():
    """Theorem 1 in a pre-norm decoder without more ado: what the norm does to 1/t is not undone."""
    plain = AbsolutePosition().build(256)
    for normalization in ("rms", "layer"):
        naive = ThroughNorm(ExactPosition(), normalization, {}, (torch.float64,))
        assert naive.check(64).holds.all()  # in float64 even without scales
        config = {**vars(plain.config), "normalization": normalization}
        decoder = Decoder(type(plain.config)(**config), seed=0).double()
        decoder.load_state_dict({**decoder.state_dict(), **plain.state_dict()})
        rows = AbsolutePosition().check(256, decoder=decoder.eval()).set_index("quantity")
        assert rows.largest_error["position"] > 50


@pytest.mark.parametrize("normalization", ["rms", "layer"])
def test_gated_units_go_through_too(normalization):
    through = ThroughNorm(Newton(), normalization, {"position": "length"}, (torch.float64,))
    decoder = through.build(48)
    assert decoder.config.activation == "swiglu" and through.check(48, decoder=decoder).holds.all()
    with torch.no_grad():
        decoder.layers[1].mlp.gate_proj.weight.zero_()  # one step of three is not taken
    assert not through.check(48, decoder=decoder).holds.any()


def test_a_smaller_constant_lets_the_content_through(construction, monkeypatch):
    monkeypatch.setitem(__import__("constructions.normalised").normalised.CONSTANT, torch.float32, 4.0)
    assert not construction.check(1024, torch.float32).holds.all()


def test_weights_are_needed(construction, needed):
    """Those of the inner rows by which a unit is read and written, in the half that is read; others are doubled."""
    decoder = construction.build(48)
    weights = []
    for name in ("layers.0.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight", "layers.1.mlp.down_proj.weight"):
        parameter = decoder.get_parameter(name)
        inner = construction.inner.build(48).get_parameter(name)
        weights += [
            (name, tuple(i)) for i in parameter[: len(inner), : parameter.shape[1] // 2].nonzero().tolist()[:12]
        ]
    found = needed(construction, 48, weights, (0.0,))
    assert len(found) >= 0.8 * len(weights) > 20


def test_it_is_as_wide_as_the_mirror_wants_with_two_heads_and_32_units_more(construction):
    for name, least in (("exact_position", 256), ("odometer_two", 1024), ("positional_heads", 256)):
        through = CONSTRUCTIONS[f"{name}_through_{construction.normalization}_norm"]
        for length in (5, LENGTH):
            inner, ours = through.inner.config(length), through.config(length)
            half = next(width for width in (128, 256, 512, 1024) if width >= inner.d_model + 2)
            assert ours.d_model == max(least, 2 * half)
            assert (ours.n_heads, ours.d_mlp) == (inner.n_heads + 2, inner.d_mlp + 32)
            kept = ("n_layers", "d_head", "activation", "score_scale", "d_vocab", "n_ctx", "encoding", "bias")
            assert all(getattr(ours, each) == getattr(inner, each) for each in kept)


def test_the_other_heads_and_units_are_drawn_as_a_decoders_first_weights(construction):
    """Of variance 1 over what is read, and 2 n_layers times less where they write: see ``Decoder.reset_parameters``."""
    inner, decoder = construction.inner.config(LENGTH), construction.written(LENGTH, torch.float32)
    config, content = decoder.config, construction.inner.layout(LENGTH).content
    x = observe(decoder, construction.tokens(LENGTH), ["hook_embed"])["hook_embed"][0]
    with torch.no_grad():
        gain = (decoder.layers[0].attention_norm(x) / x)[x != 0].median()
    q = int((x[0] == x[0, 0]).sum())
    half, of_head, of_unit = config.d_model // 2, inner.n_heads * config.d_head, inner.d_mlp

    def of_content(matrix):
        """Of "other row": the content's rows alone, and the mirror image is the negative."""
        here, mirrored = matrix[:, q : q + inner.d_model], matrix[:, half + q : half + q + inner.d_model]
        assert torch.equal(here, -mirrored)
        assert not torch.cat([here[:, : content.start], here[:, content.stop :]], dim=1).any()
        return here[:, content].flatten()

    drawn = {"heads read": [], "units read": [], "heads write": [], "units write": []}
    depth = (2 * config.n_layers) ** 0.5
    for layer in decoder.layers:
        attention, mlp = layer.attention, layer.mlp
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            drawn["heads read"].append(2 * gain * of_content(projection.weight.detach()[of_head:]) * 13**0.5)
        drawn["units read"].append(2 * gain * of_content(mlp.up_proj.weight.detach()[of_unit:]) * 13**0.5)
        written = of_content(attention.o_proj.weight.detach()[:, of_head:].T)
        drawn["heads write"].append(written * config.d_head**0.5 * depth)
        drawn["units write"].append(of_content(mlp.down_proj.weight.detach()[:, of_unit:].T) * 32**0.5 * depth)
    for what, numbers in drawn.items():
        assert kstest(torch.cat(numbers).numpy(), "norm").pvalue > 1e-3, what


def test_other_normalizations_are_refused():
    with pytest.raises(ProbeError, match=r"unknown normalization to pass through 'none'; known: layer, rms"):
        ThroughNorm(ExactPosition(), "none", {}, (torch.float64,))
