import dataclasses

import pytest
import torch

from constructions.planting import free_heads, free_rows, plant, widen
from probe.errors import ProbeError
from probe.models.decoder import Decoder, DecoderConfig
from probe.position import fit_position_probe
from probe.tracing import trace

BOS = 1


def random_decoder(seed=0, **options):
    base = {"d_vocab": 19, "n_ctx": 64, "n_layers": 3, "d_model": 32, "n_heads": 4}
    decoder = Decoder(DecoderConfig(**(base | options)), seed=seed).eval()
    with torch.no_grad():  # gains and biases as a trained model has them
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in decoder.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif name == "encoding.weight":
                parameter.mul_(20)
    return decoder


def sequences(batch=20, length=48, d_vocab=19):
    tokens = torch.randint(2, d_vocab, (batch, length), generator=torch.Generator().manual_seed(3))
    tokens[:, 0] = BOS
    return tokens


SHAPES = {
    "layer norm": {},
    "rms, swiglu, no bias": {"normalization": "rms", "activation": "swiglu", "bias": False},
    "no norm": {"normalization": "none", "activation": "relu"},
    "layer norm without bias": {"bias": False},
    "tied": {"tie_embeddings": True},
    "learned": {"encoding": "learned"},
    "t5": {"encoding": "t5"},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_wider_decoder_has_the_same_logits_and_free_room(shape):
    decoder = random_decoder(**shape).double()
    wide = widen(decoder, rows=5, heads=2)
    torch.testing.assert_close(wide(sequences()), decoder(sequences()), atol=1e-12, rtol=1e-12)
    assert free_rows(wide) == [32, 33, 34, 35, 36]
    assert all(free_heads(wide, layer) == [4, 5] for layer in range(3))
    assert free_rows(decoder) == [] and free_heads(decoder, 0) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_position_is_there_and_the_logits_are_as_before(shape, layer, dtype):
    decoder = random_decoder(**shape).to(dtype)
    planted = plant(widen(decoder), layer=layer)
    tokens = sequences()
    before, after = decoder(tokens), planted.decoder(tokens)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    stream = {}
    sites = [f"blocks.{at}.hook_resid_post" for at in range(3)]
    planted.decoder(tokens, hooks={site: lambda v, site=site: stream.update({site: v}) for site in sites})
    for at in range(3):
        read = planted.read(stream[sites[at]])
        if at < layer:
            assert (read == 0).all()
        else:
            assert (read - torch.arange(48)).abs().max() < 0.1
            assert torch.equal(read.round(), torch.arange(48).to(dtype).expand_as(read))


def test_fused_attention_counts_too():
    planted = plant(widen(random_decoder()))
    a, b = (planted.decoder(sequences(), attention=path) for path in ("explicit", "fused"))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_longer_context():
    planted = plant(widen(random_decoder(n_ctx=4096)))
    stream = []
    planted.decoder(sequences(batch=1, length=4096), hooks={"blocks.0.hook_resid_post": stream.append})
    read = planted.read(stream[0])[0]
    # In float32 the sum over keys rounds as the processor's kernels go about it: off by .06 on one, .13 on another.
    assert (read - torch.arange(4096)).abs().max() < 0.25


def test_probes_find_it_and_find_less_before():
    decoder = random_decoder()
    wide = widen(decoder)
    planted = plant(wide, layer=1).decoder
    tokens = sequences(batch=60)
    rows = fit_position_probe(
        planted,
        tokens,
        ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"],
        probes=["ridge"],
        alpha=1e-6,
        controls=["embedding"],
        n_bootstrap=20,
    )
    r2 = rows[(rows["metric"] == "r2") & (rows["control"] == "none")].set_index("site")["value"]
    assert r2["blocks.1.hook_resid_post"] > 0.9999
    assert r2["blocks.0.hook_resid_post"] < 0.99
    unplanted = fit_position_probe(
        wide, tokens, ["blocks.1.hook_resid_post"], probes=["ridge"], alpha=1e-6, controls=[], n_bootstrap=20
    )
    assert unplanted[unplanted["metric"] == "r2"]["value"].iloc[0] < 0.99


def test_without_bos_it_counts_nothing():
    planted = plant(widen(random_decoder().double()))
    tokens = sequences()
    tokens[:, 0] = 2
    read = planted.read(trace(planted.decoder, tokens, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"])
    # No key has the score c: the head averages values of 1, so what it writes is far off and the same everywhere.
    assert (read - read[:, :1]).abs().max() < 1e-3 * read.abs().max()
    assert read.abs().min() > 64


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_weight_off_by_one_per_cent_miscounts(factor):
    tokens = sequences()
    for name in ("q_proj.bias", "k_proj.weight", "v_proj.bias", "v_proj.weight", "o_proj.weight"):
        planted = plant(widen(random_decoder().double()))
        projection, kind = name.split(".")
        parameter = getattr(getattr(planted.decoder.layers[0].attention, projection), kind)
        with torch.no_grad():
            part = parameter[:, 4 * 8 : 5 * 8] if projection == "o_proj" else parameter[4 * 8 : 5 * 8]
            part.mul_(factor)
        site = "blocks.0.hook_resid_post"
        read = planted.read(trace(planted.decoder, tokens, [site])[site])
        assert (read - torch.arange(48)).abs().max() > 0.3, name


def test_the_original_is_left_alone():
    decoder = random_decoder()
    before = {name: p.clone() for name, p in decoder.named_parameters()}
    wide = widen(decoder)
    wide_before = {name: p.clone() for name, p in wide.named_parameters()}
    plant(wide)
    assert all(torch.equal(p, before[name]) for name, p in decoder.named_parameters())
    assert all(torch.equal(p, wide_before[name]) for name, p in wide.named_parameters())


def test_bad_input_is_one_clear_line():
    decoder = random_decoder()
    with pytest.raises(ProbeError, match="planting wants 4 free rows of the stream and 1 free head in layer 0, got 0"):
        plant(decoder)
    with pytest.raises(ProbeError, match="wants 4 free rows .* got 3 and 1"):
        plant(widen(decoder, rows=3))
    with pytest.raises(ProbeError, match="got 4 and 0"):
        plant(widen(decoder, heads=0))
    with pytest.raises(ProbeError, match="wants biases"):
        plant(random_decoder(bias=False))
    with pytest.raises(ProbeError, match="encoding 'rotary' acts on head 4 of layer 0"):
        plant(widen(random_decoder(encoding="rotary")))
    with pytest.raises(ProbeError, match="sinusoidal positions follow from d_model"):
        widen(random_decoder(encoding="sinusoidal"))
    with pytest.raises(ProbeError, match="slopes follow from the number of heads"):
        widen(random_decoder(encoding="alibi"))
    with pytest.raises(ProbeError, match="n_kv_heads = n_heads, got 2 for 4"):
        widen(random_decoder(n_kv_heads=2))
    with pytest.raises(ProbeError, match="only 'counting_head' can be planted .* got 'newton'"):
        plant(widen(decoder), "newton")
    with pytest.raises(ProbeError, match="layer must lie in 0…2, got 3"):
        plant(widen(decoder), layer=3)
    with pytest.raises(ProbeError, match="bos must lie in 0…18, got 19"):
        plant(widen(decoder), bos=19)


def test_a_hybrid_decoder_takes_it_where_the_encoding_is_silent():
    decoder = random_decoder(encoding="rotary", position_layers=(1, 2))
    planted = plant(widen(decoder), layer=0)
    site = "blocks.2.hook_resid_post"
    read = planted.read(trace(planted.decoder, sequences(), [site])[site])
    assert (read - torch.arange(48)).abs().max() < 0.1
    assert dataclasses.asdict(planted.decoder.config)["encoding"] == "rotary"
