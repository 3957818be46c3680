import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from scipy.special import softmax

from constructions import CONSTRUCTIONS, ExactAlibi, RelativePosition, RotaryKernel
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


def test_a_fits_error_is_the_largest_total_variation_to_a_least_squares_fit():
    rows, n = (
        fit_errors(lambda distance: torch.stack([-distance.double().sqrt(), -distance / 3.0]), (3, 5), length=14),
        14,
    )
    distance = np.arange(n)
    for found in rows.itertuples():
        angle = distance[:, None] * np.pi * np.arange(found.n_frequencies) / n
        basis = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
        wanted = -np.sqrt(distance) if found.head == 0 else -distance / 3
        fitted = basis @ np.linalg.lstsq(basis, wanted, rcond=1e-5)[0]
        apart = [
            np.abs(softmax(fitted[t::-1]) - softmax(wanted[t::-1])).sum() / 2 if t else 0.0  # t, t - 1, …, 0 away
            for t in range(n)
        ]
        assert found.total_variation == pytest.approx(max(apart), rel=1e-3)
    assert rows[["n_frequencies", "head"]].to_numpy().tolist() == [[3, 0], [3, 1], [5, 0], [5, 1]]


def test_a_table_is_looked_up_by_units_that_compare_bits():
    construction, length = CONSTRUCTIONS["rotary_kernel"], 11
    mlp, layout = construction.build(length).layers[2].mlp, construction.layout(length)
    for t in range(1, length + 1):
        bits = [t >> j & 1 for j in range(4)]
        assert mlp.up_proj.weight[t - 1, list(layout["bits"])].tolist() == [2.0 * bit - 1 for bit in bits]
        assert mlp.up_proj.bias[t - 1].item() == 1 - sum(bits)
        cosines = [math.cos(t * 10000 ** (-k / 16)) for k in range(16)]
        assert mlp.down_proj.weight[list(layout["cos"]), t - 1].tolist() == pytest.approx(cosines, abs=1e-15)


def test_fits_have_as_many_frequencies_as_they_say():
    for name, n in (("logarithmic_bias", 64), ("t5_bias", 128), ("rotary_kernel", 16)):
        construction = CONSTRUCTIONS[name]
        assert construction.n_frequencies == n and f" {n} " in construction.claim
        assert construction.position_dimensions(100) == 2 * n
    rows = fit_errors(lambda distance: -torch.log1p(distance.double())[None], length=10)
    assert rows["n_frequencies"].tolist() == [8, 16, 32, 64, 128, 256] and set(rows["length"]) == {10}


def test_tables_fall_like_trained_ones_one_head_half_as_fast_as_the_other():
    tables = torch.stack([t5_tables(seed) for seed in range(100)]).numpy()
    falls = -np.log1p(np.arange(32.0) ** 1.3)
    np.testing.assert_allclose(tables.mean(0), np.stack([falls, falls / 2], axis=1), atol=0.05)
    np.testing.assert_allclose(tables.std(0), 0.1, atol=0.03)
    assert torch.equal(t5_tables(), t5_tables(0))


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


@pytest.mark.parametrize("construction", [ExactAlibi(torch.tensor([0.5, 0.25])), RelativePosition(torch.ones(2))])
def test_every_score_and_every_pattern_counts_and_no_hidden_key_does(construction, monkeypatch):
    """One number of what is seen is changed at a time: the error is by how much, at its query and nowhere else."""
    n, last = 5, f"blocks.{construction.layers - 1}.attn"
    decoder, tokens = construction.build(n), construction.tokens(n)
    _, right = construction.errors(decoder, tokens, "explicit")
    home = sys.modules[type(construction).__module__]
    look = home.query_windows if isinstance(construction, ExactAlibi) else home.observe

    def changed(site, at, by):
        def of(seen):
            if site in seen:
                seen[site] = seen[site].clone()
                seen[site][0][at] += by
            return seen

        def looked(*arguments, edits=None, **options):
            if edits:  # the content alone, which is what is compared with
                return look(*arguments, edits=edits, **options)
            seen = look(*arguments, **options)
            return of(seen) if isinstance(seen, dict) else [(query, of(values)) for query, values in seen]

        monkeypatch.setattr(home, look.__name__, looked)
        return construction.errors(decoder, tokens, "explicit")[1]

    for head in range(2):
        for t in range(n):
            for i in range(n):
                found = changed(f"{last}.hook_attn_scores", (head, t, i), 0.25)
                wanted = torch.zeros(n, dtype=torch.float64)
                wanted[t] = 0.25 if i <= t else 0
                torch.testing.assert_close(found["scores"], wanted, atol=1e-9, rtol=0)
                assert torch.equal(found["pattern"], right["pattern"])
                found = changed(f"{last}.hook_pattern", (head, t, i), 0.25)
                wanted[t] = 0.125  # a total variation
                torch.testing.assert_close(found["pattern"], wanted, atol=1e-9, rtol=0)
                assert torch.equal(found["scores"], right["scores"])


def test_the_bounds_of_slopes_are_slopes():
    for construction in (ExactAlibi(torch.tensor([0.0, 1.0])), RelativePosition(torch.tensor([-1.0, 1.0]))):
        assert construction.check(20).holds.all()


def test_a_heads_content_has_twelve_dimensions_behind_those_of_the_bias():
    for name in ("exact_alibi", "logarithmic_bias", "t5_bias", "rotary_kernel"):
        construction, length = CONSTRUCTIONS[name], 8
        decoder, first = construction.build(length), construction.position_dimensions(length)
        rows = construction.layout(length).content
        assert decoder.config.d_head == first + 12
        for head in range(construction.n_heads):
            weights = head_weights(decoder, construction.layers - 1, head)
            for matrix in (weights.W_Q, weights.W_K):
                assert (matrix[rows, first:] != 0).all() and not matrix[rows, :first].any()


def test_wrong_slopes_are_refused():
    for slopes in (torch.tensor([]), torch.tensor([0.5, 1.5]), torch.tensor([0.5, -0.5]), torch.tensor([torch.nan])):
        with pytest.raises(ProbeError, match=r"slopes must be one number or more in \[0, 1\], got"):
            ExactAlibi(slopes)
