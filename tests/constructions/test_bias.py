import dataclasses

import pytest
import torch

from constructions import CONSTRUCTIONS, ExactAlibi, RotaryKernel
from constructions.kernels import fit_errors, t5_tables
from constructions.observing import observe
from constructions.weights import head_weights, zero_weights
from probe.errors import ProbeError
from probe.models.decoder import Decoder
from probe.models.encodings import alibi_slopes, t5_bucket


def with_encoding(construction, length: int, dtype: torch.dtype, encoding: str) -> Decoder:
    """A decoder of one layer that is given its positions: the same embeddings and content weights, none of the rest."""
    built = construction.build(length, dtype)
    config = dataclasses.replace(built.config, encoding=encoding, n_layers=1)
    decoder = Decoder(config).to(dtype)
    zero_weights(decoder)
    rows = construction.layout(length).content
    first = construction.position_dimensions(length)
    with torch.no_grad():
        decoder.token_embedding.weight[:, rows] = built.token_embedding.weight[:, rows]
        for head in range(config.n_heads):
            ours, theirs = head_weights(built, construction.layers - 1, head), head_weights(decoder, 0, head)
            theirs.W_Q[rows, first:], theirs.W_K[rows, first:] = ours.W_Q[rows, first:], ours.W_K[rows, first:]
    return decoder


def patterns(construction, decoder: Decoder, length: int) -> torch.Tensor:
    site = f"blocks.{decoder.config.n_layers - 1}.attn.hook_pattern"
    return observe(decoder, construction.tokens(length), (site,))[site][0]


def distance(p: torch.Tensor, q: torch.Tensor) -> float:
    return ((p - q).abs().sum(-1) / 2).max().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n_heads", [8, 3, 12])
def test_an_alibi_decoder_attends_in_the_same_way(n_heads, dtype):
    length, construction = 400, ExactAlibi(alibi_slopes(n_heads))
    ours = patterns(construction, construction.build(length, dtype), length)
    alibi = patterns(construction, with_encoding(construction, length, dtype, "alibi"), length)
    assert distance(ours, alibi) <= (1e-12 if dtype == torch.float64 else 1e-6)
    none = patterns(construction, with_encoding(construction, length, dtype, "none"), length)
    assert distance(ours, none) > 0.5  # it is position that makes them alike


def test_a_t5_decoder_with_the_same_tables_attends_in_the_same_way():
    length, construction = 128, CONSTRUCTIONS["t5_bias"]
    decoder = with_encoding(construction, length, torch.float64, "t5")
    with torch.no_grad():
        decoder.encoding.weight.copy_(t5_tables())
    ours = patterns(construction, construction.build(length), length)
    # 128 frequencies have 256 coefficients: up to that length the fit is exact.
    assert distance(ours, patterns(construction, decoder, length)) <= 1e-4
    with torch.no_grad():
        decoder.encoding.weight.zero_()
    assert distance(ours, patterns(construction, decoder, length)) > 0.5


def test_a_rotary_decoder_between_equal_vectors_attends_in_the_same_way():
    """Queries and keys of ones in the first half of the planes: rotary scores are then Σ_k cos ω_k (t - i)."""
    length, construction = 200, RotaryKernel()
    built = construction.build(length)
    head_weights(built, 3, 0).W_Q[construction.layout(length).content] = 0
    K = construction.n_frequencies
    config = dataclasses.replace(
        built.config, encoding="rotary", n_layers=1, n_heads=1, d_head=2 * K, score_scale=1.0, bias=True
    )
    decoder = Decoder(config).double()
    zero_weights(decoder)
    with torch.no_grad():
        decoder.layers[0].attention.q_proj.bias[:K] = 1
        decoder.layers[0].attention.k_proj.bias[:K] = 1
    assert distance(patterns(construction, built, length), patterns(construction, decoder, length)) <= 1e-12


def test_the_fits_error_falls_with_the_number_of_frequencies():
    """Total variation to -ln(1 + t - i) without content, T = 512: .031 at 32 frequencies, nothing at 256."""
    rows = fit_errors(lambda distance: -torch.log1p(distance.double())[None], (8, 32, 128, 256))
    errors = rows["total_variation"].tolist()
    assert errors == sorted(errors, reverse=True)
    assert errors[1] <= 0.04 and errors[-1] <= 1e-4
    assert rows["d_head"].tolist() == [16, 64, 256, 512]


def test_a_fit_as_fine_as_the_sequence_is_long_is_the_bias():
    # As many cosines as distances: T5's buckets with unequal values come out exactly.
    tables = t5_tables(3)
    rows = fit_errors(lambda distance: tables[t5_bucket(distance)].T, (100,), length=100)
    assert rows["total_variation"].max() < 1e-4


@pytest.mark.slow
def test_alibi_at_8192_in_float32():
    """Total variation to the true pattern within 1e-6, at the slopes 2⁻¹…2⁻⁸, and at slopes that no float holds."""
    for slopes in (alibi_slopes(8), alibi_slopes(12)[[0, 8, 9, 11]] / 1.1, torch.tensor([1.0, 1 / 3]).double()):
        rows = ExactAlibi(slopes).check(8192, torch.float32, attention="fused").set_index("quantity")
        assert rows.largest_error["pattern"] <= 1e-6, slopes
        assert (rows.positions_checked == 256).all()


@pytest.mark.parametrize("name", ["exact_alibi", "rotary_kernel"])
def test_one_percent_of_the_last_layers_weights_is_too_much(name, needed):
    construction, length = CONSTRUCTIONS[name], 48
    rows = construction.layout(length).content
    decoder = construction.build(length)
    weights = []
    for projection in ("q_proj", "k_proj"):
        full = f"layers.{construction.layers - 1}.attention.{projection}.weight"
        found = decoder.get_parameter(full).nonzero().tolist()
        weights += [(full, (i, j)) for i, j in found if not rows.start <= j < rows.stop]
    if name == "rotary_kernel":
        table = "layers.2.mlp.down_proj.weight"
        weights += [(table, tuple(i)) for i in decoder.get_parameter(table).nonzero().tolist()[::23]]
    else:  # the fine part of a slope that is a power of two is 0, and its keys are then multiplied by 0
        weights = [w for w in weights if "k_proj" not in w[0] or w[1][0] % 16 < 2]
    missing = set(weights) - set(needed(construction, length, weights, (1.01, 0.99)))
    small = {w for w in missing if abs(decoder.get_parameter(w[0])[w[1]].item()) < 1e-3}  # a cosine near its zero
    assert missing == small


def test_wrong_slopes_are_refused():
    for slopes in (torch.tensor([]), torch.tensor([0.5, 1.5]), torch.tensor([0.5, -0.5]), torch.tensor([torch.nan])):
        with pytest.raises(ProbeError, match=r"slopes must be one number or more in \[0, 1\], got"):
            ExactAlibi(slopes)
