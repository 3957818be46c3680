import numpy as np
import pandas as pd
import pytest
import torch
from peak_memory import peak_bytes
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score
from sklearn.preprocessing import StandardScaler

from constructions import CONSTRUCTIONS
from probe.errors import ProbeError
from probe.models import untrained_twin
from probe.models.lens import to_bridge
from probe.position import (
    ALL_SITES,
    LinearProbe,
    TargetContext,
    constant_tokens,
    probe_positions,
    random_tokens,
    target_values,
)
from probe.position.probes.reading import Reader
from probe.position.probes.splits import Sequences, Split
from probe.position.probes.streaming import probe_source
from probe.tracing import trace, visit

QUICK = {"n_bootstrap": 10}
SITE = "blocks.1.hook_resid_post"


def pick(rows, **where):
    for column, wanted in where.items():
        rows = rows[rows[column] == wanted]
    return rows


def value(rows, **where):
    rows = pick(rows, **where)
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def tokens_of(n=60, length=16, seed=0):
    return random_tokens(n, 19, length, seed=seed)


# ---- beside scikit-learn on stored hidden states


@pytest.mark.parametrize("with_padding", [False, True])
def test_scores_are_those_of_stored_hidden_states(with_padding, make_decoder):
    decoder, tokens = make_decoder(encoding="sinusoidal").double(), tokens_of(40)
    lengths = torch.arange(40) % 10 + 7 if with_padding else torch.full((40,), 16)
    context = TargetContext(separator=3, counted=4).for_length(16)
    names = ("position", "log_position", "relative_to_separator", "count")
    rows = probe_positions(
        decoder, tokens, [SITE], lengths=lengths, targets=names, context=context, controls=(), alphas=(3.0,), **QUICK
    )
    split = Split.by_sequence(tokens, lengths, 0.3, 0)
    x, y = {}, {}
    for side in ("train", "test"):
        part = getattr(split, side)
        counts = torch.arange(16) < part.lengths[:, None]
        x[side] = trace(decoder, part.tokens, [SITE])[SITE][counts].numpy()
        y[side] = target_values(names, part.tokens, part.lengths, context)[counts].numpy()
    for t, name in enumerate(names):
        kept = {side: ~np.isnan(y[side][:, t]) for side in y}
        scaler = StandardScaler().fit(x["train"][kept["train"]])
        ridge = Ridge(3.0).fit(scaler.transform(x["train"][kept["train"]]), y["train"][kept["train"], t])
        true, predicted = y["test"][kept["test"], t], ridge.predict(scaler.transform(x["test"][kept["test"]]))
        for metric, score in (
            ("r2", r2_score),
            ("mean_absolute_error", mean_absolute_error),
            ("mean_squared_error", mean_squared_error),
        ):
            assert value(rows, target=name, metric=metric) == pytest.approx(score(true, predicted), rel=1e-8)
        assert set(pick(rows, target=name)["n"]) == {len(true)}
    assert pick(rows, target="relative_to_separator")["n"].max() < pick(rows, target="position")["n"].min()


def test_a_direction_of_known_rank_and_noise_is_recovered():
    """h = p u + noise in rank r: R² is 1 - σ² / (σ² + Var p |u|²) along u, for the best linear map."""
    generator = torch.Generator().manual_seed(0)
    d, rank, sigma, n, length = 32, 5, 4.0, 400, 20
    basis = torch.linalg.qr(torch.randn(d, rank, generator=generator))[0]
    u = basis[:, 0]
    p = torch.arange(length).double()
    noise = (sigma * torch.randn(n, length, rank, generator=generator)) @ basis.T
    hidden = (p[None, :, None] * u + noise).double()
    flat, target = hidden.flatten(0, 1).numpy(), p.repeat(n).numpy()
    half = len(flat) // 2
    probe = LinearProbe((1e-6, 1.0), standardize=True).fit(flat[:half], target[:half], np.arange(half) // length)
    variance = (length**2 - 1) / 12
    assert probe.score(flat[half:], target[half:]) == pytest.approx(variance / (variance + sigma**2), abs=0.02)
    along = probe.coef_ @ u.double().numpy() / np.linalg.norm(basis.double().numpy().T @ probe.coef_)
    assert along > 0.99


def test_heads_are_read_one_by_one(make_decoder):
    decoder, tokens = make_decoder(), tokens_of()
    rows = probe_positions(decoder, tokens, controls=(), **QUICK)
    heads = [f"blocks.{layer}.attn.hook_z.{head}" for layer in range(2) for head in range(4)]
    assert set(heads) < set(rows["site"]) and len(set(rows["site"])) == 1 + 2 * (4 + len(ALL_SITES) - 2)
    one = probe_positions(decoder, tokens, ["blocks.1.attn.hook_z.2"], controls=(), **QUICK)
    assert one["site"].unique() == ["blocks.1.attn.hook_z.2"]
    assert one["value"].tolist() == pick(rows, site="blocks.1.attn.hook_z.2")["value"].tolist()
    with pytest.raises(ProbeError, match=r"unknown site 'blocks.1.attn.hook_z.4': the layer has no such head"):
        probe_positions(decoder, tokens, ["blocks.1.attn.hook_z.4"], controls=(), **QUICK)


def test_a_bridge_gives_what_its_decoder_gives(make_decoder):
    decoder, tokens = make_decoder(encoding="rotary"), tokens_of(30)
    options = {"alphas": (1.0,), **QUICK}
    ours, theirs = (probe_positions(model, tokens, **options) for model in (decoder, to_bridge(decoder)))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-3, atol=1e-4)


# ---- what theory says


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chance_without_bos_on_constant_tokens(dtype, make_decoder):
    # Theory, section 3: every position has the same hidden state at every layer.
    decoder = make_decoder(n_layers=3).to(dtype)
    rows = probe_positions(decoder, constant_tokens(19, 16), controls=(), targets=("position", "log_position"), **QUICK)
    assert pick(rows, metric="r2")["value"].max() < 1e-3
    told = make_decoder(encoding="learned", d_vocab=200).to(dtype)
    with torch.no_grad():
        told.encoding.weight.mul_(500)
    rows = probe_positions(told, constant_tokens(200, 16), ["blocks.0.hook_resid_pre"], controls=(), **QUICK)
    assert value(rows, metric="r2") > 0.9


@pytest.mark.parametrize("name", ["closed_form", "exact_position"])
def test_constructions_hold_position_where_they_write_it_and_not_before(name):
    construction = CONSTRUCTIONS[name]
    dtype = torch.float64 if torch.float64 in construction.max_length else torch.float32
    decoder = construction.build(32, dtype)
    tokens = torch.cat([construction.tokens(32, seed=s) for s in range(40)])
    rows = pick(probe_positions(decoder, tokens, controls=("embedding",), **QUICK), metric="r2", control="none")
    r2 = rows.set_index("site")["value"]
    last = f"blocks.{decoder.config.n_layers - 1}.hook_resid_post"
    assert r2[last] > 0.9999
    # The embedding tells <bos> from the rest, and that is all: the R² of two means, one of them of a single position.
    bos_only = 1 - (np.var(range(1, 32)) * 31 / 32) / np.var(range(32))
    assert 0.03 < r2["hook_embed"] < bos_only + 0.01 < 0.11


def test_positions_of_longer_sequences_are_an_extrapolation_curve(make_decoder):
    decoder, tokens = make_decoder(encoding="sinusoidal", n_ctx=64), tokens_of(40, 64)
    rows = probe_positions(decoder, tokens, ["blocks.0.hook_resid_pre"], fitted_length=16, controls=("shuffled",))
    assert set(rows["split"]) == {"length"}
    bins = pick(rows, scope="bin", metric="mean_absolute_error", control="none")
    assert bins["position"].tolist() == list(range(0, 64, 4)) and bins["position_end"].tolist()[-1] == 64
    fitted, beyond = (value(rows, scope=s, metric="r2", control="none") for s in ("fitted", "beyond"))
    assert fitted > 0.99 > 0 > beyond
    whole = pick(rows, scope="all", metric="mean_squared_error", control="none")
    squared = pick(rows, scope="bin", metric="mean_squared_error", control="none")
    assert whole["value"].iloc[0] == pytest.approx(np.average(squared["value"], weights=squared["n"]))
    # Exactly linear in the position: as good beyond.
    exact = CONSTRUCTIONS["closed_form"]
    longer = torch.cat([exact.tokens(64, seed=s) for s in range(12)])
    rows = probe_positions(exact.build(64), longer, ["hook_resid_post"], fitted_length=16, controls=(), **QUICK)
    assert value(rows, site=rows["site"].iloc[-1], scope="beyond", metric="r2") > 0.999


def test_another_distribution(make_decoder):
    decoder, tokens = make_decoder(encoding="sinusoidal", n_layers=1), tokens_of(40)
    rows = probe_positions(decoder, tokens, ["hook_resid_post"], test_tokens=constant_tokens(19, 16), controls=())
    assert set(rows["split"]) == {"distribution"} and set(rows["n_test"]) == {19} and set(rows["n_train"]) == {40}
    same = probe_positions(decoder, tokens, ["hook_resid_post"], test_tokens=tokens_of(19, seed=1), controls=())
    assert value(rows, metric="r2") < value(same, metric="r2")


# ---- controls and intervals


def test_controls_and_selectivity(make_decoder):
    decoder, tokens = make_decoder(encoding="sinusoidal"), tokens_of(120)
    rows = probe_positions(decoder, tokens, [SITE], seed=3)
    r2 = pick(rows, metric="r2").set_index("control")
    assert r2.loc["none", "value"] > 0.8 and (r2.loc[["embedding", "shuffled", "random"], "value"].abs() < 0.05).all()
    for control in ("untrained", "embedding", "shuffled", "random"):
        row = pick(rows, metric="selectivity", control=control).iloc[0]
        assert row["value"] == pytest.approx(r2.loc["none", "value"] - r2.loc[control, "value"])
        assert row["low"] <= row["value"] <= row["high"]
    fresh = probe_positions(untrained_twin(decoder, seed=3), tokens, [SITE], seed=3, controls=())
    assert value(fresh, metric="r2") == pytest.approx(r2.loc["untrained", "value"], rel=1e-9)


def test_shuffling_deals_out_the_positions_of_each_sequence():
    lengths = torch.tensor([5, 3, 8, 8])
    split = Split.by_distribution(tokens_of(4, 8), lengths, tokens_of(3, 8, seed=1), None)
    reader = Reader(split, ("position",), TargetContext(), seed=0)
    rows = reader._rows(split.train, slice(0, 4), shuffled=True)
    moved = 0
    for s, length in enumerate(lengths.tolist()):
        true, dealt = rows.y[rows.group == s].T.tolist()
        assert true == list(range(length)) and sorted(dealt) == true
        moved += true != dealt
    assert moved >= 3
    # Sequences in the same place of another part are dealt out otherwise: nothing common is left to be learned.
    split = Split.by_sequence(tokens_of(40, 16), None, 0.5, 0)
    reader = Reader(split, ("position",), TargetContext(), seed=0)
    a, b = (reader._rows(part, slice(0, 20), shuffled=True).y[:, 1] for part in (split.train, split.test))
    assert (a == b).double().mean() < 0.15


def test_intervals_are_those_of_sequences_drawn_anew(make_decoder):
    decoder, tokens = make_decoder(), tokens_of(60)
    split = Split.by_sequence(tokens, None, 0.3, 0)
    reader = Reader(split, ("position",), TargetContext(), 0)
    sums = probe_source(decoder, [SITE], False, reader=reader, alphas=(1.0,), folds=5)[SITE].sums[:, 0, 0].numpy()
    rows = probe_positions(decoder, tokens, [SITE], controls=(), alphas=(1.0,), n_bootstrap=2000)
    rng = np.random.default_rng(1)
    drawn = [sums[rng.integers(len(sums), size=len(sums))].sum(0) for _ in range(2000)]
    r2 = [1 - e2 / (y2 - y * y / n) for n, y, y2, e2, *_ in drawn]
    found = pick(rows, metric="r2").iloc[0]
    np.testing.assert_allclose((found["low"], found["high"]), np.quantile(r2, [0.025, 0.975]), atol=0.03)


def test_several_models(make_decoder):
    models, tokens = [make_decoder(seed=s) for s in range(3)], tokens_of()
    together = probe_positions(models, tokens, [SITE], controls=())
    alone = [probe_positions(m, tokens, [SITE], controls=()) for m in models]
    assert value(together, metric="r2") == pytest.approx(np.mean([value(a, metric="r2") for a in alone]))
    widths = [float((r["high"] - r["low"])[r["metric"] == "r2"].iloc[0]) for r in (together, *alone)]
    values = [value(a, metric="r2") for a in alone]
    assert widths[0] > (max(values) - min(values)) / 3  # the models differ, and the interval says so


# ---- memory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tokens():
    script = """
import torch
from probe.models.decoder import Decoder, DecoderConfig
from probe.position import probe_positions
n = {n}
config = DecoderConfig(d_vocab=50, n_ctx=64, n_layers=2, d_model=128, n_heads=2, d_mlp=128)
tokens = torch.randint(50, (n, 64), generator=torch.Generator().manual_seed(0))
probe_positions(Decoder(config), tokens, controls=("shuffled",), n_bootstrap=2, batch_size=16)
"""
    peaks = [peak_bytes(script.replace("{n}", str(n))) for n in (100, 1600)]
    stored = 1500 * 64 * 128 * 4 * 13  # what the hidden states of the further tokens take: 639 MB
    assert peaks[1] - peaks[0] < 0.05 * stored


# ---- what is refused


def test_bad_input_is_one_clear_line(make_decoder):
    decoder, tokens = make_decoder(), tokens_of(10)

    def refused(message, model=decoder, given=tokens, sites=("hook_resid_post",), **options):
        with pytest.raises(ProbeError, match=message) as caught:
            probe_positions(model, given, sites, **({"controls": (), **QUICK} | options))
        assert "\n" not in str(caught.value)

    refused("the same sequence on both sides, got 1", given=torch.cat((tokens, tokens[:1])), test=torch.tensor([10]))
    refused("the same sequence on both sides, got 2", test_tokens=torch.cat((tokens_of(4, seed=5), tokens[:2])))
    refused("at least 4 distinct sequences, got 1", given=tokens[:1].expand(9, -1))
    refused("target 'count' must vary", targets=("count",), context=TargetContext(counted=999))
    refused(
        "relative_to_separator wants at least 2 tokens", targets=("relative_to_separator",), context=TargetContext(99)
    )
    refused("alphas must be numbers above 0, got \\[0.0\\]", alphas=(0.0,))
    refused("unknown control 'nothing'", controls=("nothing",))
    refused("holds no hidden states", sites=["attn.hook_q"])
    refused("fitted_length \\(16\\) must be below the longest test sequence", fitted_length=16)
    refused("lengths must be 10 numbers in 1…16", lengths=torch.full((10,), 17))
    with pytest.raises(ProbeError, match="tokens must be lists of integers of equal length: pad them on the right"):
        Sequences.of([[1, 2], [3, 4, 5]], None)
    with torch.no_grad():
        decoder.token_embedding.weight[3] = torch.nan
    refused("hidden states at 'blocks.0.hook_resid_post' must be finite")


def test_fewer_tokens_than_dimensions(make_decoder):
    rows = probe_positions(make_decoder(d_model=64), tokens_of(4, 4), [SITE], controls=(), **QUICK)
    assert np.isfinite(rows["value"]).all()


def test_visit_keeps_nothing_and_hands_on_what_trace_keeps(make_decoder):
    decoder, tokens = make_decoder(), tokens_of(5)
    seen = {}
    n = visit(decoder, tokens, ["hook_resid_post"], lambda *a: seen.setdefault(a[0], []).append(a[1:]), batch_size=2)
    assert n == 2 and [rows for _, rows in seen[SITE]] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert torch.equal(torch.cat([v for v, _ in seen[SITE]]), trace(decoder, tokens, [SITE], batch_size=2)[SITE])
