"""Training towards the construction, and measures of how near it comes; the construction itself is their oracle."""

import dataclasses
import inspect
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import linregress
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from constructions import learnability as module
from constructions.absolute import AbsolutePosition, ClosedForm
from constructions.learnability import GRID, RESULTS, VARIANTS, LearningConfig, learnability, measure, train_from
from constructions.learning_measures import (
    TARGETS,
    error_measures,
    head_measures,
    site_measures,
    weight_measures,
)
from constructions.learning_starts import STARTS, hand_built
from probe import Decoder, trace
from probe.errors import ProbeError

COLUMNS = ["run", "normalization", "bos", "target", "layers", "seed", "start", "stage", "site", "layer", "head"]
COLUMNS += ["metric", "value"]
T = 12


def small(**options) -> LearningConfig:
    return LearningConfig(**{"length": T, "d_model": 16, "n_heads": 2, "layers": 1, **options})


def tokens(config: LearningConfig, batch: int = 32) -> torch.Tensor:
    return config.tokens(batch, torch.Generator().manual_seed(0))


def built(config: LearningConfig, seed: int = 0) -> Decoder:
    return STARTS[config.start].build(config.decoder_config(), config.target, seed)


def value(found, metric: str, site: str | None = None, layer: int | None = None) -> float:
    (number,) = [each.value for each in found if (each.metric, each.site, each.layer) == (metric, site, layer)]
    return number


@pytest.fixture(scope="module")
def trained() -> pd.DataFrame:
    return learnability([small(layers=2), small(start="closed_form_times_noise")], seeds=(0, 1), steps=30)


@pytest.mark.parametrize("target", TARGETS)
def test_the_construction_is_what_the_measures_call_one(target):
    config = small(start="closed_form", target=target)
    decoder, seen = built(config), tokens(config)
    measured = head_measures(decoder, seen)
    assert {(each.site, each.layer, each.head) for each in measured} == {("attn.hook_pattern", 0, 0)}
    found = {each.metric: each.value for each in head_measures(decoder, seen)}
    assert found == pytest.approx({"slope": -1, "c": 0, "spread": 0, "evenness": 1, "correlation": 1}, abs=1e-6)

    sites = site_measures(decoder, seen)
    assert value(sites, "r2_reciprocal", "hook_resid_mid", 0) == pytest.approx(1, abs=1e-3)
    assert value(sites, "r2_position", "hook_resid_post", 0) == pytest.approx(1, abs=1e-3)
    assert value(sites, "r2_position", "hook_resid_mid", 0) < 0.9
    assert all(each.value <= 0 for each in sites if each.site == "hook_embed")

    errors = error_measures(decoder, seen, target)
    assert value(errors, "mean_absolute_error") == pytest.approx(0, abs=1e-5)
    assert value(errors, "accuracy") == 1


def test_its_loss_is_the_one_that_is_derived():
    """Squared error 0; classes normally distributed with variance 1 about t: -ln p(t) by the sum over all classes."""
    config = small(start="closed_form", target="regression")
    assert value(error_measures(built(config), tokens(config), "regression"), "loss") == pytest.approx(0, abs=1e-12)
    config = small(start="closed_form", target="classification")
    loss = value(error_measures(built(config), tokens(config), "classification"), "loss")
    wanted = [math.log(sum(math.exp(-((t - k) ** 2) / 2) for k in range(1, T + 1))) for t in range(1, T + 1)]
    assert loss == pytest.approx(sum(wanted) / T, abs=1e-4)


def test_starts_are_the_construction_that_with_noise_or_a_random_decoder():
    for name, construction in (("closed_form", ClosedForm()), ("absolute_position", AbsolutePosition())):
        for target in TARGETS:
            shape = small(start=name, target=target).decoder_config()
            exact = hand_built(shape, target, construction)
            written = construction.build(T, torch.float32)
            noisy = {kind: STARTS[kind].build(shape, target, 5) for kind in STARTS if kind.startswith(f"{name}_")}
            generators = {kind: torch.Generator().manual_seed(5) for kind in noisy}
            assert not any(decoder.training for decoder in noisy.values()) and noisy
            for parameter, weight in exact.named_parameters():
                if parameter not in ("head.weight", "token_embedding.weight"):
                    assert torch.equal(weight, written.get_parameter(parameter)), parameter
                assert torch.equal(built(small(start=name, target=target)).get_parameter(parameter), weight)
                for kind, decoder in noisy.items():
                    n = torch.randn(weight.shape, generator=generators[kind])
                    wanted = weight * (1 + 0.05 * n) if kind.endswith("times_noise") else weight + 0.01 * n
                    torch.testing.assert_close(decoder.get_parameter(parameter), wanted)
    for name in ("random", "random_alike"):
        shape = small(start=name).decoder_config()
        for parameter, weight in Decoder(shape, seed=5).named_parameters():
            assert torch.equal(STARTS[name].build(shape, "regression", 5).get_parameter(parameter), weight)


def test_positions_are_read_as_numbers_or_as_one_of_as_many_classes_as_tokens():
    logits = torch.zeros(1, 3, 5)
    logits[0, :, 0] = torch.tensor([1.0, 2.0, 4.0]) / 3
    assert TARGETS["regression"].position(logits).tolist() == [pytest.approx([1, 2, 4])]
    assert float(TARGETS["regression"].loss(logits)) == pytest.approx(1 / 27)
    logits = torch.zeros(2, 3, 5)
    logits[:, :, 4] = 9  # no class: there are three positions
    logits[:, 0, 1], logits[:, 1, 2], logits[1, 2, 0] = 2, 3, 1
    assert TARGETS["classification"].position(logits).tolist() == [[2, 3, 1], [2, 3, 1]]
    e = math.e
    first, second = math.log(2 + e**2), math.log(2 + e**3)
    losses = [[first, second, math.log(3)], [first, second, math.log(2 + e)]]
    assert float(TARGETS["classification"].loss(logits)) == pytest.approx(sum(map(sum, losses)) / 6, rel=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_masking_bos_breaks_it(target):
    """Then the head adds 0 instead of 1/t, and every token but <bos> says f(0) = 1 + 2 (T - 1), or the last class."""
    config = small(start="closed_form", target=target)
    errors = error_measures(built(config), tokens(config), target)
    said = 2 * T - 1 if target == "regression" else T
    wanted = sum(said - t for t in range(2, T + 1)) / T
    for layer in (0, None):
        masked = value(errors, "mean_absolute_error_masked", "attn.hook_attn_scores", layer)
        assert masked == pytest.approx(wanted, abs=1e-4)
        assert value(errors, "accuracy_masked", "attn.hook_attn_scores", layer) <= 2 / T + 1e-6


def test_a_head_that_prefers_bos_shows_by_how_much():
    """<bos> gets a score of 1.5 more than any other key: log-odds 1.5 - ln(t - 1)."""
    config = small(start="closed_form")
    decoder = built(config)
    attention = decoder.layers[0].attention
    with torch.no_grad():
        attention.q_proj.weight[0, 0] = 1.0  # row ONE
        attention.k_proj.weight[0, 1] = 1.5 / attention.scaling  # row IS_BOS
    found = {each.metric: each.value for each in head_measures(decoder, tokens(config))}
    assert found["slope"] == pytest.approx(-1, abs=1e-6)
    assert found["c"] == pytest.approx(1.5, abs=1e-6)
    assert found["spread"] == pytest.approx(0, abs=1e-6)
    assert found["evenness"] == pytest.approx(1, abs=1e-6)
    assert found["correlation"] > 0.7  # though p is nowhere near 1/t


def test_head_measures_agree_with_the_pattern_and_scipy():
    config = small(layers=2)
    decoder, seen = built(config), tokens(config)
    pattern = trace(decoder, seen).pattern(0).double()
    found = {(each.head, each.metric): each.value for each in head_measures(decoder, seen)}
    others = torch.arange(1, T).double()
    for head in range(2):
        p = pattern[:, head, 1:, 0]
        log_odds = (p / (1 - p)).log()
        fit = linregress(others.log().expand_as(p).flatten(), log_odds.flatten())
        assert found[head, "slope"] == pytest.approx(fit.slope, rel=1e-4)
        assert found[head, "spread"] == pytest.approx(log_odds.numpy().var(axis=0, ddof=1).mean() ** 0.5, rel=1e-4)
        rest = pattern[:, head, 2:, 1:] / pattern[:, head, 2:, 1:].sum(-1, keepdim=True)
        evenness = torch.special.entr(rest).sum(-1) / others[1:].log()
        assert found[head, "evenness"] == pytest.approx(evenness.mean().item(), rel=1e-4)


@pytest.mark.parametrize("batch", [2, 7])
def test_site_measures_are_scikit_learns_ridge_on_standardised_coordinates(batch):
    config = small(layers=2)
    decoder, seen = built(config), tokens(config, batch)
    half, t = batch // 2, torch.arange(2, T + 1).double()
    wanted = torch.stack([1 / t, t.log(), t], dim=1).numpy()
    for alpha in (1.0, 0.1):
        found = site_measures(decoder, seen) if alpha == 1 else site_measures(decoder, seen, alpha)
        assert len(found) == 5 * 3
        for site, layer in (
            ("hook_resid_mid", 0),
            ("hook_resid_post", 0),
            ("hook_resid_mid", 1),
            ("hook_resid_post", 1),
        ):
            hidden = trace(decoder, seen, [f"blocks.{layer}.{site}"]).hidden(f"blocks.{layer}.{site}")[:, 1:].double()
            fit, test = hidden[:half].flatten(0, 1).numpy(), hidden[half:].flatten(0, 1).numpy()
            ridge = make_pipeline(StandardScaler(), Ridge(alpha=alpha)).fit(fit, np.tile(wanted, (half, 1)))
            residual = np.tile(wanted, (batch - half, 1)) - ridge.predict(test)
            r2 = 1 - (residual**2).sum(0) / ((batch - half) * ((wanted - wanted.mean(0)) ** 2).sum(0))
            got = [value(found, f"r2_{what}", site, layer) for what in ("reciprocal", "log", "position")]
            assert got == pytest.approx(r2.tolist(), rel=1e-6)


def test_the_least_that_can_be_measured():
    seen = tokens(small(length=3), 2)
    for measures in (head_measures, site_measures):
        found = measures(built(small()), seen)
        assert len({(each.site, each.layer, each.head, each.metric) for each in found}) == len(found) > 0


@pytest.mark.parametrize("normalization", ["none", "layer"])
def test_without_bos_a_constant_string_holds_no_position(normalization):
    config = small(layers=2, bos=False, normalization=normalization)
    constant = torch.full((16, T), 3)
    assert all(each.value <= 0 for each in site_measures(built(config), constant))
    errors = error_measures(built(config), constant, "classification")
    assert value(errors, "accuracy") == pytest.approx(1 / T)


def test_weights_are_compared_with_the_start_and_the_construction():
    config = small(start="closed_form_times_noise", length=64)
    exact = hand_built(config.decoder_config(), config.target, ClosedForm())
    start, layout = built(config), ClosedForm().layout(64)
    found = weight_measures(start, start, exact, layout)
    assert value(found, "change_from_start") == 0
    assert value(found, "change_from_construction") == pytest.approx(0.05, rel=0.15)
    assert value(found, "weight_elsewhere") == 0
    moved = built(config)
    with torch.no_grad():
        moved.layers[0].attention.v_proj.weight.mul_(1.5)  # its only essential weight
    site = "layers.0.attention.v_proj.weight"
    ratio = (start.get_parameter(site) / exact.get_parameter(site)).nanmean().item()
    found = weight_measures(moved, exact, exact, layout)
    assert value(found, "change_from_construction", site) == pytest.approx(abs(1.5 * ratio - 1), rel=1e-4)
    plus = built(small(start="closed_form_plus_noise", length=64))
    assert value(weight_measures(plus, start, exact, layout), "weight_elsewhere") == pytest.approx(0.01, rel=0.1)


def test_rows_are_tidy_and_the_same_twice(trained):
    again = learnability([small(layers=2), small(start="closed_form_times_noise")], seeds=(0, 1), steps=30)
    pd.testing.assert_frame_equal(trained, again)
    assert list(trained.columns) == COLUMNS
    assert not trained.value.isna().any()
    assert not trained.duplicated([name for name in COLUMNS if name != "value"]).any()
    assert trained.groupby("run").seed.first().tolist() == [0, 1, 0, 1]
    assert set(trained.stage) == {"initial", "trained"}
    by_run = [trained[trained.run == run].value.reset_index(drop=True) for run in (0, 1)]
    assert not by_run[0].equals(by_run[1])


def test_weights_are_measured_where_they_start_from_a_construction(trained):
    of_weights = trained[trained.metric.isin(["change_from_start", "change_from_construction", "weight_elsewhere"])]
    assert set(of_weights.run) == {2, 3} and set(of_weights.start) == {"closed_form_times_noise"}
    without_site = of_weights[of_weights.site.isna()]
    assert (without_site.groupby(["run", "stage"]).metric.nunique() == 3).all()
    config = small(start="random_alike")  # its shape alone
    assert not {each.metric for each in measure(built(config), config, built(config))} & set(of_weights.metric)


def test_training_lowers_the_loss(trained):
    loss = trained[trained.metric == "loss"].pivot(index="run", columns="stage", values="value")
    assert (loss.trained < loss.initial).all()


def test_the_rate_rises_over_a_twentieth_and_falls_to_zero_and_gradients_are_clipped(monkeypatch):
    seen, drawn = [], []

    class Recorded(torch.optim.AdamW):
        def step(self, closure=None):
            (group,) = self.param_groups
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
            seen.append((group["lr"], group["weight_decay"], norm))
            return super().step(closure)

    class Config(LearningConfig):
        def tokens(self, batch, generator):
            drawn.append(batch)
            return super().tokens(batch, generator)

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    config = Config(length=T, d_model=16, n_heads=2, layers=1)
    decoder = built(config)
    with torch.no_grad():
        decoder.head.weight.mul_(100)  # so that there is something to clip
    train_from(decoder, config, steps=40, generator=torch.Generator().manual_seed(0))
    rates, decays, norms = zip(*seen, strict=True)
    assert rates == pytest.approx([0.0015, 0.003, *(0.003 * n / 38 for n in range(38, 0, -1))])
    assert set(decays) == {0.0} and set(drawn) == {32} and not decoder.training
    assert max(norms) == pytest.approx(1, abs=1e-4)
    seen.clear(), drawn.clear()
    learnability([config], seeds=(0,), steps=1, batch_size=5, learning_rate=0.5, weight_decay=0.25)
    assert [row[:2] for row in seen] == [(0.5, 0.25)] and drawn == [256, 5, 256]
    seen.clear(), drawn.clear()
    learnability([config], seeds=(0,), steps=1)
    assert [row[:2] for row in seen] == [(0.003, 0.0)] and drawn == [256, 32, 256]


def test_what_is_trained_if_nothing_is_said_is_what_the_table_holds():
    parameters = inspect.signature(learnability).parameters
    assert (parameters["steps"].default, parameters["seeds"].default) == (1000, (0, 1))
    assert parameters["configs"].default == GRID
    stated = {"normalization": "none", "bos": True, "target": "classification", "layers": 2, "start": "random"}
    stated |= {"length": 64, "d_model": 64, "n_heads": 4}
    assert dataclasses.asdict(LearningConfig()) == stated
    config = LearningConfig().decoder_config()
    assert (config.d_vocab, config.n_ctx, config.d_model, config.n_heads, config.n_layers) == (64, 64, 64, 4, 2)
    assert (config.activation, config.normalization, config.encoding) == ("relu", "none", "none")
    assert LearningConfig(length=9).decoder_config().d_vocab == 16  # the tokens


def test_the_content_of_embeddings_is_nobodys_to_measure():
    config, layout = small(start="closed_form"), ClosedForm().layout(T)
    exact, moved = built(config), built(config)
    with torch.no_grad():
        moved.token_embedding.weight[:, layout.content] += 1
    assert all(each.value == 0 for each in weight_measures(moved, exact, exact, layout))
    with torch.no_grad():
        moved.token_embedding.weight[:, layout.content.start - 1] += 1  # 1/t's row
    found = weight_measures(moved, exact, exact, layout)
    assert value(found, "change_from_construction") == value(found, "change_from_start") == 0
    assert value(found, "weight_elsewhere") > 0


def test_the_initial_stage_is_the_start_itself(trained):
    config = small(layers=2)
    alone = measure(built(config, seed=1), config, built(config, seed=1))
    rows = trained[(trained.run == 1) & (trained.stage == "initial")]
    assert rows.value.tolist() == [each.value for each in alone]


def test_tokens_are_random_content_behind_bos():
    drawn = small(length=64).tokens(64, torch.Generator().manual_seed(1))
    assert (drawn[:, 0] == 0).all()
    assert drawn[:, 1:].unique().tolist() == list(range(1, 16))
    assert small(bos=False).tokens(64, torch.Generator().manual_seed(1)).min() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "ranking"}, "unknown target 'ranking'; known: classification, regression"),
        ({"start": "luck"}, "unknown start 'luck'; known: absolute_position"),
        ({"normalization": "batch"}, "unknown normalization 'batch'"),
        ({"length": 2}, "length must be an integer of at least 3, got 2"),
        ({"start": "closed_form", "layers": 2}, "start 'closed_form' wants layers=1, got 2"),
        ({"start": "closed_form", "bos": False}, "start 'closed_form' wants bos=True, got False"),
        ({"start": "random_alike", "normalization": "layer"}, "wants normalization='none', got 'layer'"),
        ({"d_model": 10, "n_heads": 4}, "d_model (10) must be divisible by n_heads (4)"),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ProbeError) as error:
        small(**options)
    assert message in str(error.value)


def test_bad_calls_are_refused():
    with pytest.raises(ProbeError, match="at least one config and one seed, got 0 and 2"):
        learnability([])
    with pytest.raises(ProbeError, match="steps must be an integer of at least 0, got -1"):
        learnability([small()], steps=-1)
    with pytest.raises(ProbeError, match="learning_rate must be a number above 0, got 0"):
        learnability([small()], learning_rate=0)
    with pytest.raises(ProbeError, match="head measures want at least 2 sequences of 3 tokens"):
        head_measures(built(small()), torch.zeros(1, T, dtype=torch.long))
    with pytest.raises(ProbeError, match="site measures want at least 2 sequences of 3 tokens"):
        site_measures(built(small()), torch.zeros(4, 2, dtype=torch.long))


def test_main_writes_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "GRID", (small(layers=2),))
    monkeypatch.setattr(module, "VARIANTS", (small(), small(start="closed_form")))
    monkeypatch.setattr(
        "sys.argv", ["learnability", "--folder", str(tmp_path / "new" / "er"), "--steps", "1", "--seeds", "3", "4"]
    )
    module.main()
    assert torch.get_num_threads() == 1
    rows = pd.read_csv(tmp_path / "new" / "er" / "learnability.csv")
    assert list(rows.columns) == COLUMNS
    assert rows.groupby("run").seed.first().tolist() == [3, 4, 3, 3]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].split()[-2:] for line in lines] == [[s, "random"] for s in "343"] + [
        ["3", "closed_form"]
    ]
    for line in lines:
        said = [" ".join(part.split()[:2]) for part in line.split(" | ")[1:]]
        assert said == [f"{at} {what}" for at in ("initial", "trained") for what in ("mean_absolute_error", "accuracy")]
    monkeypatch.setattr("sys.argv", ["learnability", "--steps", "-1"])
    with pytest.raises(SystemExit):
        module.main()
    assert "steps must be an integer of at least 0, got -1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.read_csv(RESULTS / "learnability.csv", keep_default_na=False, na_values=[""])


def test_the_table_holds_the_grid_before_and_after(table):
    assert list(table.columns) == COLUMNS
    assert (RESULTS / "learnability.csv").stat().st_size < 300_000
    assert not table.value.isna().any()
    assert (table.groupby("run").stage.nunique() == 2).all()
    held = table.groupby("run")[["normalization", "bos", "target", "layers", "start"]].first()
    wanted = [(c.normalization, c.bos, c.target, c.layers, c.start) for c in (*GRID, *GRID, *VARIANTS)]
    assert sorted(held.itertuples(index=False, name=None)) == sorted(wanted)


def test_the_table_shows_what_is_said_to_be_found(table):
    trained = table[table.stage == "trained"]
    error = trained[trained.metric == "mean_absolute_error"].set_index("run")
    learned = error[(error.start == "random") & (error.layers == 2)]
    assert learned[learned.bos].value.max() < learned[~learned.bos].value.min()
    masked = trained[(trained.metric == "mean_absolute_error_masked") & (trained.layer == 0)].set_index("run")
    with_bos = learned[learned.bos].index
    assert (masked.value[with_bos] > 10 * error.value[with_bos]).all()


def test_initial_rows_of_the_table_are_found_again(table):
    """They do not depend on the number of steps."""
    run = table[(table.run == 0) & (table.stage == "initial")]
    config = GRID[0]
    found = measure(built(config), config, built(config))
    assert run.value.tolist() == pytest.approx([each.value for each in found], rel=1e-3, abs=1e-4)
