import pytest
import torch

from constructions.layout import (
    BOS,
    CONTENT,
    D_MODEL,
    D_VOCAB,
    IS_BOS,
    ONE,
    POSITION,
    Layout,
    write_embeddings,
)
from constructions.weights import head_weights, perturbed, write_head, write_mlp_units, write_units, zero_weights
from probe.errors import ProbeError
from probe.models.decoder import Decoder, DecoderConfig


def small(**changes) -> Decoder:
    sizes = {"d_vocab": 5, "n_ctx": 4, "n_layers": 2, "d_model": 6, "n_heads": 2, "d_head": 3, "d_mlp": 8}
    config = DecoderConfig(**{**sizes, "normalization": "none", "activation": "relu", **changes})
    return Decoder(config).double()


def test_head_weights_are_the_matrices_of_q_k_v_and_the_output():
    decoder, tokens = small(), torch.tensor([[0, 3, 1, 4]])
    kept = {}
    sites = ["hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "hook_attn_out"]
    hooks = {f"blocks.1.{site}": lambda x, site=site: kept.update({site: x}) for site in sites}
    decoder(tokens, hooks=hooks)
    x, written = kept["hook_resid_pre"], 0
    for head in range(2):
        W = head_weights(decoder, 1, head)
        for site, matrix in (("attn.hook_q", W.W_Q), ("attn.hook_k", W.W_K), ("attn.hook_v", W.W_V)):
            torch.testing.assert_close(kept[site][:, :, head], x @ matrix)
        written = written + kept["attn.hook_z"][:, :, head] @ W.W_O
    torch.testing.assert_close(kept["hook_attn_out"], written)


def test_a_layout_is_three_rows_what_is_named_and_the_content():
    layout = Layout(bits=2, near=1, not_bos=1)
    assert (ONE, IS_BOS, POSITION) == (0, 1, 2) and BOS == 0 and D_VOCAB == 32
    assert [layout[name] for name in ("bits", "near", "not_bos")] == [range(3, 5), range(5, 6), range(6, 7)]
    assert layout.row("near") == 5 and "near" in layout and "far" not in layout
    assert layout.content == slice(7, 20) and layout.d_model == 20
    assert (Layout().content, Layout().d_model) == (CONTENT, D_MODEL) == (slice(3, 16), 16)
    embedded = torch.zeros(3, 20)
    for row in range(20):
        stream = embedded.clone()
        stream[1, row] = -2
        touched = row in (0, 1) or row >= 7
        assert layout.change(embedded, stream).tolist() == [0, 2 if touched else 0, 0]


def test_embeddings_are_the_rows_of_a_layout():
    layout = Layout(near=1, not_bos=1)
    content = torch.randn(5, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    named = torch.tensor([[1, 1, 0, 0, 0]] + 4 * [[1, 0, 0, 0, 1]], dtype=torch.float64)
    decoder = small(d_model=18)
    zero_weights(decoder)
    write_embeddings(decoder, layout)
    assert torch.equal(decoder.token_embedding.weight, torch.cat([named, content], dim=1))
    decoder = small(d_model=16)
    zero_weights(decoder)
    write_embeddings(decoder, seed=0)
    assert torch.equal(decoder.token_embedding.weight, torch.cat([named[:, :3], content], dim=1))


def test_zeroed_decoder_is_all_zero_and_written_entries_are_the_only_others():
    decoder = small()
    zero_weights(decoder)
    assert all((parameter == 0).all() for parameter in decoder.parameters())
    write_head(decoder, 1, 1, query={(5, 2): 2.0}, key={(4, 1): 3.0}, value={(3, 0): 4.0}, output={(0, 2): 5.0})
    left = {name: p.nonzero().tolist() for name, p in decoder.named_parameters() if p.count_nonzero()}
    # Head 1 of 2 with three dimensions: its dimension j is column or row 3 + j of the projections.
    assert left == {
        "layers.1.attention.q_proj.weight": [[5, 5]],
        "layers.1.attention.k_proj.weight": [[4, 4]],
        "layers.1.attention.v_proj.weight": [[3, 3]],
        "layers.1.attention.o_proj.weight": [[2, 3]],
    }


def test_mlp_units_compute_what_is_written():
    decoder = small()
    zero_weights(decoder)
    read, bias = {0: torch.tensor([1.0, -2.0]), 3: torch.tensor([0.5, 0.0])}, torch.tensor([-0.25, 1.0])
    write_mlp_units(
        decoder, 0, read=read, bias=bias, write={4: torch.tensor([3.0, 7.0])}, output_bias={5: -1.5}, first=2
    )
    x = torch.randn(1, 10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden = torch.stack((x[..., 0] + 0.5 * x[..., 3] - 0.25, -2 * x[..., 0] + 1), dim=-1).clamp(min=0)
    wanted = torch.zeros_like(x)
    wanted[..., 4], wanted[..., 5] = 3 * hidden[..., 0] + 7 * hidden[..., 1], -1.5
    torch.testing.assert_close(decoder.layers[0].mlp(x), wanted)
    assert decoder.layers[0].mlp.up_proj.weight.any(1).nonzero().flatten().tolist() == [2, 3]


def test_gated_units_multiply():
    decoder = small(activation="swiglu")
    zero_weights(decoder)
    one = torch.ones(1)
    write_mlp_units(decoder, 0, gate={1: 2 * one}, gate_bias=0.5 * one, read={0: 3 * one}, bias=one, write={4: one})
    x = torch.randn(1, 10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = torch.zeros_like(x)
    wanted[..., 4] = torch.nn.functional.silu(2 * x[..., 1] + 0.5) * (3 * x[..., 0] + 1)
    torch.testing.assert_close(decoder.layers[0].mlp(x), wanted)
    with pytest.raises(ProbeError, match=r"a gate is for swiglu and swiglu wants one, got activation 'swiglu'"):
        write_mlp_units(decoder, 0, read={}, bias=one, write={})
    with pytest.raises(ProbeError, match=r"got activation 'relu'"):
        write_mlp_units(small(), 0, gate={}, read={}, bias=one, write={})


def test_units_one_by_one_are_the_same_as_in_columns():
    one_by_one, columns = small(), small()
    for decoder in (one_by_one, columns):
        zero_weights(decoder)
    units = [({0: 1.0, 3: 0.5}, -0.25, {4: 3.0}), ({0: -2.0}, 1.0, {4: 7.0})]
    assert write_units(one_by_one, 0, units, {5: -1.5}, first=2) == 4
    assert write_units(one_by_one, 0, [], first=8) == 8  # none, behind the last
    read, bias = {0: torch.tensor([1.0, -2.0]), 3: torch.tensor([0.5, 0.0])}, torch.tensor([-0.25, 1.0])
    write = {4: torch.tensor([3.0, 7.0])}
    write_mlp_units(columns, 0, read=read, bias=bias, write=write, output_bias={5: -1.5}, first=2)
    for name, parameter in columns.named_parameters():
        assert one_by_one.get_parameter(name).equal(parameter), name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda d: head_weights(d, 2, 0), r"layer must lie in 0…1, got 2"),
        (lambda d: head_weights(d, 0, -1), r"head must lie in 0…1, got -1"),
        (lambda d: head_weights(small(n_kv_heads=1), 0, 0), r"n_kv_heads = n_heads"),
        (
            lambda d: write_mlp_units(d, 2, read={}, bias=torch.zeros(3), write={}),
            r"layer must lie in 0…1, got 2",
        ),
        (
            lambda d: write_mlp_units(d, 0, read={}, bias=torch.zeros(3), write={}, first=6),
            r"d_mlp is 8, got units 6…8",
        ),
        (lambda d: perturbed(d, "layers.0.nothing", (0,)), r"unknown weight 'layers\.0\.nothing'; known: "),
        (
            lambda d: perturbed(d, "layers.0.mlp.up_proj.bias", (1,)),
            r"must not be 0, got layers\.0\.mlp\.up_proj\.bias",
        ),
    ],
)
def test_wrong_inputs_are_refused(wrong, message):
    with pytest.raises(ProbeError, match=message):
        wrong(small())


def test_perturbed_changes_one_number_of_a_copy():
    decoder = small()
    before = {name: p.clone() for name, p in decoder.named_parameters()}
    twin = perturbed(decoder, "layers.0.attention.q_proj.weight", (1, 2), factor=3.0)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(decoder.get_parameter(name), before[name], rtol=0, atol=0)
        changed = (parameter != before[name]).nonzero().tolist()
        assert changed == ([[1, 2]] if name == "layers.0.attention.q_proj.weight" else [])
    assert (
        twin.get_parameter("layers.0.attention.q_proj.weight")[1, 2]
        == 3 * before["layers.0.attention.q_proj.weight"][1, 2]
    )
