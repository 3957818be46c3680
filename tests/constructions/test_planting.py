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


def test_room_is_four_rows_and_a_head_if_nothing_is_said_and_none_if_none_is_wanted():
    decoder = random_decoder(norm_eps=1e-3).double().train()
    wide = widen(decoder)
    assert (wide.config.d_model, wide.config.n_heads, wide.config.n_kv_heads) == (36, 5, 5)
    assert (
        wide.config.norm_eps == pytest.approx(1e-3 * 32 / 36) and wide.training and not widen(decoder.eval()).training
    )
    assert (wide.config.bias, wide.config.tie_embeddings) == (True, False)
    same = widen(decoder, rows=0, heads=0)
    assert (same.config.d_model, same.config.n_heads, same.config.norm_eps) == (32, 4, 1e-3)
    torch.testing.assert_close(same(sequences()), decoder(sequences()), atol=1e-12, rtol=1e-12)
    # Tiny hidden states, which eps counts beside.
    with torch.no_grad():
        decoder.token_embedding.weight.mul_(1e-2)
    torch.testing.assert_close(widen(decoder)(sequences()), decoder(sequences()), atol=1e-12, rtol=1e-12)
    for what in ("rows", "heads"):
        with pytest.raises(ProbeError, match=f"{what} must be an integer of at least 0, got -1"):
            widen(decoder, **{what: -1})
    assert widen(random_decoder(encoding="alibi"), heads=0).config.d_model == 36
    assert widen(random_decoder(encoding="sinusoidal"), rows=0).config.n_heads == 5
    assert widen(random_decoder(n_kv_heads=2), heads=0).config.n_kv_heads == 2


@pytest.mark.parametrize("encoding", ["learned", "randomized"])
def test_a_row_that_one_position_alone_writes_is_not_free(encoding):
    wide = widen(random_decoder(encoding=encoding))
    table = wide.encoding.weight if encoding == "learned" else wide.encoding.base.weight
    assert free_rows(wide) == [32, 33, 34, 35]
    with torch.no_grad():
        table[-1, 33] = 1e-3
        wide.head.weight[0, 32] = 1e-3
    assert free_rows(wide) == [34, 35]


@pytest.mark.parametrize("normalization", ["layer", "rms"])
def test_what_was_planted_is_said(normalization):
    options = {} if normalization == "layer" else {"normalization": "rms", "activation": "swiglu"}
    wide = widen(random_decoder(**options).double())
    mirrored = normalization == "layer"
    planted = plant(wide, layer=1, length=40, bos=0, amplitude=0.01)
    assert (planted.layer, planted.head, planted.length, planted.slope) == (1, 4, 40, 0.01 / 40)
    assert (planted.row, planted.twin) == ((34, 35) if mirrored else (33, None))
    embedding = planted.decoder.token_embedding.weight
    assert embedding[0, 32:].tolist() == ([0.01, -0.01, 0, 0] if mirrored else [0.01, 0, 0, 0])
    assert not embedding[1:, 32:].any() and not planted.decoder.training
    tokens = sequences(length=40)
    tokens[:, 0], tokens[:, 1] = 0, 1
    site = "blocks.1.hook_resid_mid"
    stream = trace(planted.decoder, tokens, [site])[site]
    assert (planted.read(stream) - torch.arange(40)).abs().max() < 0.06  # the curvature is .05
    if mirrored:
        torch.testing.assert_close(stream[..., 35], -stream[..., 34], atol=1e-12, rtol=0)
    usual = plant(wide)
    assert (usual.layer, usual.length, usual.slope) == (0, 64, 1e-3 / 64)
    assert usual.decoder.token_embedding.weight[1, 32].item() == 1e-3
    assert plant(wide, bos=18, layer=2, length=2).length == 2
    for message, wrong in {
        "length must be an integer of at least 2, got 1": {"length": 1},
        "amplitude must be a number above 0, got 0": {"amplitude": 0},
        "layer must lie in 0…2, got -1": {"layer": -1},
        "bos must lie in 0…18, got -1": {"bos": -1},
    }.items():
        with pytest.raises(ProbeError, match=message):
            plant(wide, **wrong)


@pytest.mark.parametrize("encoding", ["alibi_learned", "t5", "transformer_xl", "cope", "xpos"])
def test_an_encoding_that_acts_on_the_planted_head_is_refused(encoding):
    wide = widen(random_decoder(encoding=encoding, bias=True))
    if encoding in ("alibi_learned", "t5"):  # the new head's bias is 0 or e^0 a token
        with torch.no_grad():
            next(wide.encoding.parameters()).fill_(1)
    with pytest.raises(ProbeError, match=f"encoding '{encoding}' acts on head 4 of layer 0"):
        plant(wide)


def test_a_hybrid_decoder_takes_it_where_the_encoding_is_silent():
    decoder = random_decoder(encoding="rotary", position_layers=(1, 2))
    planted = plant(widen(decoder), layer=0)
    site = "blocks.2.hook_resid_post"
    read = planted.read(trace(planted.decoder, sequences(), [site])[site])
    assert (read - torch.arange(48)).abs().max() < 0.1
    assert dataclasses.asdict(planted.decoder.config)["encoding"] == "rotary"
