import numpy as np
import pytest
import torch
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.preprocessing import StandardScaler

from probe.errors import ProbeError
from probe.models.lens import to_bridge
from probe.position import fit_position_probe
from probe.position.probes.splits import Split
from probe.tracing import Trace, trace

QUICK = {"n_bootstrap": 20}


def value(rows, **where):
    for column, wanted in where.items():
        rows = rows[rows[column] == wanted]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def test_a_learned_table_is_read_perfectly_and_the_embedding_not(make_decoder, random_tokens):
    # The position is added to the stream by a table, so it can be read behind the embedding; tokens are random, so
    # the token embedding alone tells nothing.
    decoder, tokens = make_decoder(encoding="learned"), random_tokens(batch=120)
    with torch.no_grad():
        decoder.encoding.weight.mul_(50)
    rows = fit_position_probe(decoder, tokens, ["hook_embed", "blocks.0.hook_resid_pre"], **QUICK)
    at = {"site": "blocks.0.hook_resid_pre", "control": "none"}
    assert value(rows, **at, probe="ridge", metric="r2") > 0.95
    assert value(rows, **at, probe="logistic", metric="accuracy") > 0.95
    for control in ("embedding", "shuffled"):
        assert value(rows, **(at | {"control": control}), probe="ridge", metric="r2") < 0.1
        assert value(rows, **(at | {"control": control}), probe="logistic", metric="accuracy") < 0.2
    assert value(rows, site="hook_embed", control="none", probe="ridge", metric="r2") < 0.1


def test_nothing_can_be_read_without_bos_from_constant_tokens(make_decoder):
    # Theory, section 3: every position has the same hidden state at every layer, so no probe can beat chance.
    decoder = make_decoder(n_layers=3).double()
    # Distinct sequences (by their token) of constant tokens.
    tokens = torch.arange(19)[:, None].expand(-1, 16)
    rows = fit_position_probe(decoder, tokens, controls=(), **QUICK)
    assert rows[rows["metric"] == "r2"]["value"].max() < 1e-6
    assert rows[rows["metric"] == "accuracy"]["value"].max() <= 1 / 16 + 1e-9


def test_untrained_nope_already_tells_position(make_decoder, random_tokens):
    # Haviv 2022, Chi 2023: with <bos>, position is there at initialisation; this is what the control is for.
    tokens = random_tokens(batch=200)
    tokens[:, 0] = 0
    rows = fit_position_probe(make_decoder(), tokens, ["blocks.1.hook_resid_post"], probes=["ridge"], **QUICK)
    assert value(rows, control="untrained", metric="r2") > 0.3


def test_the_regression_is_scikit_learns(make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding="sinusoidal"), random_tokens(batch=40)
    rows = fit_position_probe(
        decoder, tokens, ["blocks.0.hook_resid_post"], probes=["ridge"], controls=(), seed=5, alpha=3.0, **QUICK
    )
    split = Split.by_sequence(tokens, None, 0.3, 5)
    site = "blocks.0.hook_resid_post"
    train, test = (
        trace(decoder, part.tokens, [site])[site].reshape(-1, 32).numpy() for part in (split.train, split.test)
    )
    scaler = StandardScaler().fit(train)
    ridge = Ridge(alpha=3.0).fit(scaler.transform(train), np.tile(np.arange(16), 28))
    true, predicted = np.tile(np.arange(16), 12), ridge.predict(scaler.transform(test))
    assert value(rows, metric="r2") == pytest.approx(r2_score(true, predicted), abs=1e-4)
    assert value(rows, metric="mean_absolute_error") == pytest.approx(mean_absolute_error(true, predicted), abs=1e-4)
    assert rows["n_train"].unique() == [28] and rows["n_test"].unique() == [12]


def test_whole_sequences_are_split_and_doubles_count_once(make_decoder, random_tokens):
    tokens = random_tokens(batch=20)
    twice = fit_position_probe(make_decoder(), torch.cat([tokens, tokens]), probes=["ridge"], controls=(), **QUICK)
    assert set(twice["n_train"] + twice["n_test"]) == {20}


def test_padding_is_left_out(make_decoder, random_tokens):
    decoder, tokens = make_decoder(), random_tokens(batch=30)
    lengths = torch.arange(30) % 10 + 6
    padded = tokens.clone()
    padded[torch.arange(16) >= lengths[:, None]] = 0
    a, b = (fit_position_probe(decoder, t, lengths=lengths, probes=["ridge"], **QUICK) for t in (tokens, padded))
    assert a["value"].tolist() == pytest.approx(b["value"].tolist())


def test_a_bridge_gives_what_its_decoder_gives(make_decoder, random_tokens):
    decoder, tokens = make_decoder(), random_tokens(batch=20)
    for given in ({"untrained": make_decoder(seed=1)}, {}):  # a bridge's own untrained one is its decoder's
        options = {"probes": ["ridge"], **given, **QUICK}
        ours, theirs = (fit_position_probe(model, tokens, **options) for model in (decoder, to_bridge(decoder)))
        assert ours["value"].tolist() == pytest.approx(theirs["value"].tolist(), abs=1e-4)


def test_intervals_hold_the_value_and_are_repeatable(make_decoder, random_tokens):
    tokens = random_tokens(batch=60)
    a, b = (fit_position_probe(make_decoder(), tokens, probes=["ridge"], seed=2, n_bootstrap=200) for _ in range(2))
    assert a.equals(b)
    assert ((a["low"] <= a["value"]) & (a["value"] <= a["high"])).all()
    assert (a["high"] - a["low"] > 0)[a["metric"] != "selectivity"].all()
    at_embedding = a[(a["metric"] == "selectivity") & (a["control"] == "embedding") & (a["site"] == "hook_embed")]
    assert (at_embedding[["value", "low", "high"]] == 0).all(axis=None)  # the draws are paired


def test_bad_input_is_one_clear_line(make_decoder, random_tokens):
    decoder, tokens = make_decoder(), random_tokens(batch=8)
    with pytest.raises(ProbeError, match="at least 4 distinct sequences, got 1"):
        fit_position_probe(decoder, tokens[:1].expand(9, -1))
    with pytest.raises(ProbeError, match="at least 2 tokens, got tokens of shape"):
        fit_position_probe(decoder, tokens[:, :1])
    with pytest.raises(ProbeError, match="unknown control 'none'; known: embedding, random, shuffled, untrained"):
        fit_position_probe(decoder, tokens, controls=["none"])
    with pytest.raises(ProbeError, match="unknown probe 'mlp'; known: logistic, ridge"):
        fit_position_probe(decoder, tokens, probes=["mlp"])
    with pytest.raises(ProbeError, match="unknown site 'blocks.7.hook_resid_post'"):
        fit_position_probe(decoder, tokens, ["blocks.7.hook_resid_post"])
    with pytest.raises(ProbeError, match="test_share must be a number above 0 and below 1, got 1.0"):
        fit_position_probe(decoder, tokens, test_share=1.0)
    with torch.no_grad():
        decoder.token_embedding.weight[3] = torch.nan
    with pytest.raises(ProbeError, match="hidden states at 'hook_embed' must be finite"):
        fit_position_probe(decoder, tokens)
    with pytest.raises(ProbeError, match="holds no hidden states"):
        Trace(tokens, torch.full((8,), 16), {"x": torch.zeros(8, 3)}, 1).hidden("x")


def test_a_dummy_classifier_is_what_shuffled_positions_come_to(make_decoder, random_tokens):
    decoder, tokens = make_decoder(encoding="learned"), random_tokens(batch=150)
    rows = fit_position_probe(decoder, tokens, ["blocks.1.hook_resid_post"], controls=["shuffled"], **QUICK)
    position = np.tile(np.arange(16), 100)
    chance = DummyClassifier(strategy="uniform", random_state=0).fit(position[:, None], position)
    chance = chance.score(position[:, None], position)
    assert value(rows, control="shuffled", metric="accuracy") == pytest.approx(chance, abs=0.04)
