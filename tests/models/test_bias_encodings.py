import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.stats import kstest
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as build_falcons

from probe.errors import ProbeError
from probe.limits import limits
from probe.models.encodings import alibi_slopes, make_encoding

DIMS = {"d_model": 16, "n_heads": 4, "d_head": 8, "n_ctx": 64, "n_layers": 2}
LIKE = torch.zeros((), dtype=torch.float64)
N = 23


def made(name, **options):
    encoding = make_encoding(name, options, **DIMS).double()
    encoding.reset_parameters(torch.Generator().manual_seed(0))
    return encoding


def bias_of(encoding, n=N):
    """Its bias where keys are visible, 0 elsewhere."""
    return encoding.bias(torch.arange(n), torch.arange(n), LIKE).tril().detach().numpy()


def by_loops(entry, n_heads=4, n=N):
    bias = np.zeros((n_heads, n, n))
    for h in range(n_heads):
        for i in range(n):
            for j in range(i + 1):
                bias[h, i, j] = entry(h, i, j)
    return bias


@pytest.mark.parametrize("n_heads", [4, 6])
def test_learned_slopes_start_as_hugging_faces_alibi(n_heads):
    encoding = make_encoding("alibi_learned", {}, **(DIMS | {"n_heads": n_heads})).double()
    encoding.reset_parameters()
    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), n_heads, torch.float32)[:, 0, 1].double().numpy()
    wanted = by_loops(lambda h, i, j: -theirs[h] * (i - j), n_heads)
    np.testing.assert_allclose(bias_of(encoding), wanted, rtol=1e-6)


def test_learned_slopes_are_positive_whatever_is_learned():
    encoding = made("alibi_learned")
    with torch.no_grad():
        encoding.log_slopes.copy_(torch.tensor([-9.0, -1.0, 0.0, 3.0]))
    wanted = by_loops(lambda h, i, j: -(math.e ** [-9, -1, 0, 3][h]) * (i - j))
    np.testing.assert_allclose(bias_of(encoding), wanted, rtol=1e-12)


def test_alibi_of_keys_is_alibi_less_what_all_keys_of_a_query_share():
    query, key = torch.arange(3, N), torch.arange(N)
    keys, alibi = (made(name).bias(query, key, LIKE) for name in ("alibi_keys", "alibi"))
    shared = (keys - alibi)[:, :, :1]
    torch.testing.assert_close(keys - alibi, shared.expand_as(alibi), rtol=0, atol=1e-14)
    assert torch.equal(made("alibi_keys", scale=0.5).bias(query, key, LIKE), keys / 2)


def falcons(n_heads, d_head, n):
    """The bias of n keys, "head key", as in a Falcon with so many heads."""
    dimensions = DIMS | {"n_heads": n_heads, "d_head": d_head}
    encoding = make_encoding("alibi_keys", {"scale": d_head**-0.5, "rounded": "bfloat16"}, **dimensions)
    return encoding.bias(torch.tensor([n - 1]), torch.arange(n), LIKE)[:, 0]


@pytest.mark.parametrize("n_heads", [1, 4, 6, 8, 32, 71])
def test_rounded_alibi_of_keys_is_falcons(n_heads):
    theirs = build_falcons(torch.ones(1, 2048, dtype=torch.long), n_heads, torch.float64)[:, 0]
    # With d_head = 1 to the last bit.
    assert torch.equal(falcons(n_heads, 1, 2048), theirs)
    torch.testing.assert_close(falcons(n_heads, 24, 2048), theirs / math.sqrt(24), rtol=1e-15, atol=0)


@pytest.mark.parametrize(("n_heads", "first"), [(4, 257), (6, 257), (8, 257), (12, 3), (32, 3)])
def test_rounding_bends_the_bias(n_heads, first):
    bias = falcons(n_heads, 1, 600)
    off = (bias - bias[:, 1:2] * torch.arange(600)).abs().amax(0) > 0
    assert int(off.nonzero()[0]) == first


def test_how_far_falcons_bias_is_from_any_line():
    bias, i, one = falcons(32, 64, 2048), np.arange(2048.0), np.ones(2048)
    # Least e with |bias_i - a i - c| <= e.
    bounds = np.concatenate([np.c_[-i, -one, -one], np.c_[i, one, -one]])
    away = [linprog([0, 0, 1], bounds, np.r_[-b, b], bounds=[(None, None)] * 2 + [(0, None)]).fun for b in bias.numpy()]
    assert max(away) == pytest.approx(0.90, abs=0.005)
    alibi = -alibi_slopes(32)[:, None] * torch.arange(2047, -1, -1) / 8
    variation = (bias.softmax(-1) - alibi.softmax(-1)).abs().sum(-1) / 2
    assert float(variation.max()) == pytest.approx(0.14, abs=0.005)


def test_rounded_alibi_of_keys_sees_a_shift(make_decoder, random_tokens):
    # 300 tokens on, where the unrounded one sees none (tests/models/test_decoder.py).
    for rounded, sees in (("none", False), ("bfloat16", True)):
        decoder = make_decoder(encoding="alibi_keys", encoding_options={"rounded": rounded}).double()
        change = decoder(random_tokens()) - decoder(random_tokens(), positions=torch.arange(300, 316))
        assert (change.abs().max() > 1e-3) == sees and (change.abs().max() < 1e-11) != sees


def test_kerple_is_the_papers_formula():
    log, power = made("kerple"), made("kerple", kernel="power")
    r1, r2 = (rate.tolist() for rate in log.rates())
    np.testing.assert_allclose(
        bias_of(log), by_loops(lambda h, i, j: -r1[h] * math.log(1 + r2[h] * (i - j))), rtol=1e-12
    )
    p1, p2 = (rate.tolist() for rate in power.rates())
    np.testing.assert_allclose(bias_of(power), by_loops(lambda h, i, j: -p1[h] * (i - j) ** p2[h]), rtol=1e-12)


@pytest.mark.parametrize(("kernel", "most_r1", "most_r2"), [("log", 2, 1), ("power", 1, 2)])
def test_kerples_first_rates_are_drawn_as_in_its_code(kernel, most_r1, most_r2):
    encoding = make_encoding("kerple", {"kernel": kernel}, **(DIMS | {"n_heads": 4000})).double()
    encoding.reset_parameters(torch.Generator().manual_seed(0))
    for rate, most in zip(encoding.rates(), (most_r1, most_r2), strict=True):
        assert 0.01 <= rate.min() < 0.02 * most and 0.98 * most < rate.max() <= most
        assert float(rate.detach().mean()) == pytest.approx(most / 2, abs=0.03 * most)


def test_kerples_rates_stay_where_they_must():
    for kernel, most in (("log", math.inf), ("power", 2)):
        encoding = made("kerple", kernel=kernel)
        for raw in (-30.0, 30.0):
            with torch.no_grad():
                encoding.raw_r1.fill_(raw), encoding.raw_r2.fill_(raw)
            for rate, highest in zip(encoding.rates(), (math.inf, most), strict=True):
                assert (rate > 0).all() and (rate <= highest).all()


@pytest.mark.parametrize("kernel", ["log", "power"])
def test_kerples_gradient_is_finite_at_distance_0_and_at_hidden_keys(kernel):
    encoding = made("kerple", kernel=kernel)
    encoding.bias(torch.arange(9), torch.arange(9), LIKE).sum().backward()
    for parameter in encoding.parameters():
        assert parameter.grad.isfinite().all() and (parameter.grad != 0).all()


def test_sandwich_has_128_dimensions_as_in_the_papers_listing_where_none_are_named():
    np.testing.assert_array_equal(bias_of(made("sandwich")), bias_of(made("sandwich", d_bar=128)))


@pytest.mark.parametrize("d_bar", [128, 6])
def test_sandwich_is_the_product_of_sinusoidal_positions(d_bar):
    # The listing in the paper's appendix.
    positions, i = np.arange(N)[:, None], np.arange(d_bar // 2)
    angles = positions / 10000 ** (2 * i / d_bar)
    vectors = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    compression = np.arange(1, 5) * 8 / 4
    wanted = np.tril(vectors @ vectors.T / compression[:, None, None])
    np.testing.assert_allclose(bias_of(made("sandwich", d_bar=d_bar)), wanted, rtol=1e-12)


@pytest.mark.parametrize("threshold", [512.0, 7.0])
def test_fire_is_the_papers_formula(threshold):
    fire = made("fire", threshold=threshold)
    with torch.no_grad():
        fire.c.fill_(-0.3)  # only its size counts
        fire.multiplier.fill_(1.5)
    w1, b1, w2 = (p.detach().numpy() for p in (fire.in_weight, fire.in_bias, fire.out_weight))

    def psi(x):
        return math.log(0.3 * x + 1)

    def entry(h, i, j):
        x = psi(i - j) / (psi(max(i, 1.5 * threshold)) + 1e-6)
        return sum(w2[h, m] * max(0.0, w1[m] * x + b1[m]) for m in range(32))

    np.testing.assert_allclose(bias_of(fire), by_loops(entry), rtol=1e-10, atol=1e-12)


def test_fires_first_values_are_those_of_its_listing_and_of_torch():
    fire = made("fire")
    assert (fire.c.item(), fire.multiplier.item(), fire.threshold) == (pytest.approx(0.1), 1.0, 512.0)
    assert len(fire.in_weight) == len(fire.in_bias) == fire.out_weight.shape[1] == 32
    wide = made("fire", width=5000)
    for drawn, most in ((wide.in_weight, 1), (wide.in_bias, 1), (wide.out_weight, 5000**-0.5)):
        assert kstest(drawn.detach().numpy().ravel() / most, "uniform", (-1, 2)).pvalue > 0.01


def test_fire_holds_64_mebibytes_of_hidden_numbers_and_one_query_at_the_least(monkeypatch):
    fire, seen = made("fire").float(), []
    monkeypatch.setattr(fire, "_mlp", lambda x: seen.append(len(x)) or torch.zeros(*x.shape, 4))
    like = torch.zeros(())
    fire.bias(torch.arange(600), torch.arange(1024), like)
    assert seen == [512, 88] and 512 * 1024 * 32 * torch.float32.itemsize == 64 * 2**20
    seen.clear()
    fire.bias(torch.arange(3), torch.arange(2**19 + 1), like)
    assert seen == [1, 1, 1]


def test_fire_is_made_for_some_queries_at_a_time():
    fire = made("fire")
    whole = bias_of(fire)
    with limits(fire_block=32 * N * 5):
        np.testing.assert_allclose(bias_of(fire), whole, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("t5", {}),
        ("alibi", {}),
        ("alibi_learned", {}),
        ("alibi_keys", {"scale": 0.3, "rounded": "bfloat16"}),
        ("kerple", {}),
        ("kerple", {"kernel": "power"}),
        ("sandwich", {}),
        ("fire", {"threshold": 5.0}),
    ],
    ids=str,
)
def test_scattered_positions_give_the_rows_and_columns_of_the_whole(name, options):
    encoding = made(name, **options)
    everywhere = encoding.bias(torch.arange(50), torch.arange(50), LIKE)
    for query, key in (([3, 40, 41, 49], [0, 2, 39]), (range(1, 20, 2), range(0, 30, 2)), (range(9), range(0, 9, 2))):
        query, key = torch.tensor(query), torch.tensor(key)
        torch.testing.assert_close(encoding.bias(query, key, LIKE), everywhere[:, query][:, :, key])


def test_bad_options_are_one_clear_line():
    with pytest.raises(ProbeError, match="unknown rounding of alibi_keys 'float16'; known: bfloat16, none"):
        made("alibi_keys", rounded="float16")
    with pytest.raises(ProbeError, match="scale must be a number above 0, got 0"):
        made("alibi_keys", scale=0)
    with pytest.raises(ProbeError, match="unknown kernel 'gauss'; known: log, power"):
        made("kerple", kernel="gauss")
    with pytest.raises(ProbeError, match="even d_bar, got 7"):
        made("sandwich", d_bar=7)
    with pytest.raises(ProbeError, match="d_bar must be an integer of at least 2, got 0"):
        made("sandwich", d_bar=0)
    with pytest.raises(ProbeError, match="width must be an integer of at least 1, got 0"):
        made("fire", width=0)
    with pytest.raises(ProbeError, match="threshold must be a number above 0, got -1"):
        made("fire", threshold=-1)
    with pytest.raises(ProbeError, match="n_buckets must be an integer of at least 1, got True"):
        made("t5", n_buckets=True)
