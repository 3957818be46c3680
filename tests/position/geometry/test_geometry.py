import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from probe.errors import ProbeError
from probe.position.geometry.channels import position_channels
from probe.position.geometry.decomposition import decompose_hidden
from probe.position.geometry.similarity import neighbour_similarity
from probe.position.geometry.variance import variance_by_position
from probe.tracing import Trace, trace

SITE = "blocks.0.hook_attn_out"
B, T, D = 40, 24, 12
QUICK = {"n_bootstrap": 20}


def made(x, lengths=None, tokens=None, site=SITE):
    """A trace that holds x."""
    tokens = torch.zeros(x.shape[:2], dtype=torch.long) if tokens is None else tokens
    lengths = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
    return Trace(tokens, lengths, {site: x}, 1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(rows, metric, control="none", column="value", **where):
    rows = rows[(rows["metric"] == metric) & (rows["control"] == control)]
    for key, wanted in where.items():
        rows = rows[rows[key] == wanted]
    assert len(rows) == 1
    return rows[column].iloc[0]


@pytest.fixture(scope="module")
def planted():
    """Position along two directions, context along a third, tokens along the next two, noise everywhere."""
    t = torch.arange(T, dtype=torch.float64)
    basis = torch.linalg.qr(normal(D, D, seed=1))[0]
    position = torch.stack((torch.cos(2 * torch.pi * t / T), torch.sin(2 * torch.pi * t / T)), 1) * 2**0.5
    tokens = torch.randint(0, 2, (B, T), generator=torch.Generator().manual_seed(2))
    x = 3 + 2 * position[None] @ basis[:2] + normal(B, 1, 1, seed=3) * basis[2]
    x = x + (2 * tokens[..., None] - 1) * basis[3] + 0.1 * normal(B, T, D, seed=4)
    return made(x, tokens=tokens), t


# ---- decomposition


def test_shares_are_those_of_song_and_zhong(planted):
    """Written out in numpy as in their section 2; the token's part is an analysis of variance of their residual."""
    traced, _ = planted
    shares = decompose_hidden(traced, skip=0).rows
    h = traced[SITE].numpy()
    mu = h.mean((0, 1))
    pos, ctx = h.mean(0) - mu, h.mean(1) - mu
    residual = h - mu - pos[None] - ctx[:, None]
    total = ((h - mu) ** 2).sum()
    tokens = traced.tokens.numpy()
    of_token = sum((tokens == v).sum() * (residual[tokens == v].mean(0) ** 2).sum() for v in (0, 1))
    # What chance makes of the means of B sequences: T - 1 degrees of freedom of the two-way analysis of variance.
    chance = (T - 1) * (residual**2).sum() / ((B - 1) * (T - 1))
    wanted = {
        "share_position": (B * (pos**2).sum() - chance) / total,
        "share_context": T * (ctx**2).sum() / total,
        "share_token": of_token / total,
        "share_residual": ((residual**2).sum() - of_token + chance) / total,
    }
    for metric, number in wanted.items():
        assert value(shares, metric) == pytest.approx(number, rel=1e-9)
        assert value(shares, metric, column="low") <= number <= value(shares, metric, column="high")
    # Planted: 4 · 2 of the position, 1 of the context, 1 of the token.
    assert value(shares, "share_position") == pytest.approx(0.8, abs=0.03)
    # Position times two equal cosines: two dimensions, and the noise of the means beside them.
    assert value(shares, "participation_ratio") == pytest.approx(2, abs=0.02)
    assert value(shares, "components_95") == 2
    # Shuffled, nothing is position's.
    assert value(shares, "share_position", "shuffled") == pytest.approx(0, abs=0.3 / B)


@pytest.mark.parametrize("n", [6, 40])
def test_without_position_its_share_is_0_on_average_whatever_the_number_of_sequences(n):
    """With a part that each sequence has at all its positions. What was taken for position's was 1/n of the rest."""
    found = []
    for seed in range(30):
        x = normal(n, 8, 4, seed=seed) + 2 * normal(n, 1, 4, seed=seed + 100)
        rows = decompose_hidden(made(x, torch.full((n,), 8)), skip=0).rows
        found.append(value(rows, "share_position"))
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(30) + 1e-9 and np.std(found) < 0.2 / n


def test_the_basis_is_the_principal_components(planted):
    traced, _ = planted
    basis = decompose_hidden(traced, skip=0, components=2).basis
    pos = traced[SITE].numpy().mean(0)
    pos = pos - pos.mean(0)
    left, strength, _ = np.linalg.svd(pos, full_matrices=False)
    for c, part in basis.groupby("component"):
        np.testing.assert_allclose(np.abs(part["value"]), np.abs(left[:, c] * strength[c]) / T**0.5, atol=1e-9)
        assert part["share"].iloc[0] == pytest.approx(strength[c] ** 2 / (strength**2).sum())
    assert basis["position"].tolist() == [*range(T)] * 2


def test_shares_add_up_with_lengths_that_differ_and_padding_is_not_read(planted):
    traced, _ = planted
    lengths = torch.arange(B) % (T - 4) + 5
    x = traced[SITE].clone()
    x[torch.arange(T) >= lengths[:, None]] = 1e6
    found = [decompose_hidden(made(each, lengths, traced.tokens)).rows for each in (x, traced[SITE])]
    pd.testing.assert_frame_equal(*found)
    parts = found[0][found[0]["metric"].str.startswith("share_")]
    np.testing.assert_allclose(parts.groupby("control")["value"].sum(), 1)


def test_untrained_is_a_control_and_nothing_varies_in_constants(planted):
    traced, _ = planted
    rows = decompose_hidden(traced, untrained=made(torch.ones(B, T, D))).rows
    assert set(rows["control"]) == {"none", "untrained", "shuffled"}
    assert np.isnan(value(rows, "share_position", "untrained"))


# ---- neighbours


def test_similarity_of_a_known_process():
    """x_t = ρ x_{t-1} + √(1 - ρ²) ε_t is stationary with correlation ρ^k, in many dimensions also its cosine."""
    rho, steps = 0.8, normal(30, 40, 400)
    x = [steps[:, 0]]
    for t in range(1, 40):
        x.append(rho * x[-1] + (1 - rho**2) ** 0.5 * steps[:, t])
    rows = neighbour_similarity(made(torch.stack(x, 1)), max_lag=6, **QUICK)
    for k in range(1, 7):
        assert value(rows, "hidden", lag=k) == pytest.approx(rho**k, abs=0.02)
        assert abs(value(rows, "hidden", "shuffled", lag=k) - value(rows, "hidden", "shuffled", lag=1)) < 0.02
    assert value(rows, "hidden_spearman") == 1
    assert (rows["n"] == 30).all()


def test_similarities_are_cosines_within_lengths(planted):
    traced, _ = planted
    lengths = torch.arange(B) % (T - 6) + 7
    rows = neighbour_similarity(made(traced[SITE], lengths), max_lag=3, skip=2, **QUICK)
    h = traced[SITE].numpy()
    for k in (1, 3):
        cosines = [
            h[b, t] @ h[b, t + k] / np.linalg.norm(h[b, t]) / np.linalg.norm(h[b, t + k])
            for b in range(B)
            for t in range(2, int(lengths[b]) - k)
        ]
        assert value(rows, "hidden", lag=k) == pytest.approx(np.mean(cosines))
    means = np.array([h[lengths.numpy() > t, t].mean(0) for t in range(2, int(lengths.max()))])
    means -= means.mean(0)
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    assert value(rows, "position_mean", lag=3) == pytest.approx((unit[3:] * unit[:-3]).sum(1).mean())


# ---- variance


def test_the_variance_of_running_means_falls_as_one_over_t():
    """Uniform attention on independent values: Var = σ²/t, the exponent is 1. Chi et al. 2023."""
    x = normal(400, 32, 8).cumsum(1) / torch.arange(1, 33)[:, None]
    rows = variance_by_position(made(x), skip=0, **QUICK)
    exponent = rows[rows["metric"] == "exponent"].iloc[0]
    assert exponent["value"] == pytest.approx(1, abs=0.05) and exponent["low"] < 1 < exponent["high"]
    variance = rows[rows["metric"] == "variance"].set_index("position")["value"]
    np.testing.assert_allclose(variance, x.numpy().var(0, ddof=1).mean(-1))
    slope = np.polyfit(np.log(np.arange(1, 33)), np.log(variance.astype(float)), 1)[0]
    assert exponent["value"] == pytest.approx(-slope)


def test_an_untrained_decoder_with_uniform_attention_has_variance_decay(make_decoder, random_tokens):
    decoder = make_decoder()
    with torch.no_grad():
        decoder.layers[0].attention.q_proj.weight.zero_()
    traced = trace(decoder, random_tokens(300, 24), ["blocks.0.hook_attn_out", "blocks.0.attn.hook_z"])
    rows = variance_by_position(traced, [*traced.values], skip=0, **QUICK)
    found = rows[rows["metric"] == "exponent"]
    assert found["head"].isna().tolist() == [True, False, False, False, False]
    np.testing.assert_allclose(found["value"], 1, atol=0.1)
    assert (rows[rows["metric"] == "exponent_r2"]["value"] > 0.95).all()


def test_what_does_not_vary_has_no_exponent():
    x = normal(1, T, D).expand(B, T, D) + 1e-15 * normal(B, T, D, seed=1)  # equal but for rounding
    tokens = torch.arange(B * T).view(B, T)  # other sequences, with states that are alike
    rows = variance_by_position(made(x, tokens=tokens), **QUICK)
    assert (rows[rows["metric"] == "variance"]["value"] == 0).all()
    assert rows[rows["metric"] == "exponent"]["value"].isna().all()


# ---- channels


def test_a_monotone_channel_is_found_and_its_correlation_is_scipys():
    x = normal(B, T, D)
    x[..., 7] = -torch.arange(T).double().sqrt() + 0.05 * normal(B, T, seed=1)
    x[..., 3] += 0.1 * torch.arange(T)
    x[..., 5] = 1.0
    rows = position_channels(made(x), top=3, **QUICK)
    assert rows[(rows["control"] == "none") & (rows["metric"] == "spearman")]["channel"].tolist()[:2] == [7, 3]
    for channel in (7, 3):
        wanted = np.mean([spearmanr(one[1:, channel], np.arange(1, T)).statistic for one in x.numpy()])
        assert value(rows, "spearman", channel=channel) == pytest.approx(wanted)
    assert value(rows, "monotone", channel=7) == 1
    # No channel of the shuffled control comes near, though it shows its best.
    assert rows[(rows["control"] == "shuffled") & (rows["metric"] == "spearman")]["value"].abs().max() < 0.15
    assert value(rows, "spearman", channel=3, column="low") > 0.3


# ---- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decompose_hidden(made(normal(1, T, D))), "at least 2 distinct sequences, got 1"),
        (lambda: decompose_hidden(made(normal(B, 2, D))), "at least 2 of 2 positions, got 1"),
        (lambda: decompose_hidden(made(normal(B, T, D)), ["hook_embed"]), "the trace holds no 'hook_embed'"),
        (lambda: decompose_hidden(made(normal(B, T, D) / 0)), "must be finite"),
        (lambda: decompose_hidden(made(normal(B, T, 2, D))), "hidden states at some site, got a trace at"),
        (lambda: neighbour_similarity(made(normal(B, T, D)), max_lag=T), f"max_lag must lie in 1…{T - 2}"),
        (lambda: variance_by_position(made(normal(B, T, D), site="hook_embed")), "got none of it"),
        (lambda: position_channels(made(normal(B, 3, D))), "at least 4 positions a sequence, got 3"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ProbeError, match=message):
        call()
