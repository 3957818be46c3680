import numpy as np
import pandas as pd
import pytest

from probe.errors import ProbeError
from probe.models.decoder import Decoder, DecoderConfig
from probe.position.geometry.channels import position_channels
from probe.position.geometry.decomposition import decompose_hidden
from probe.position.geometry.similarity import neighbour_similarity
from probe.position.geometry.variance import variance_by_position
from probe.position.mechanism.naming import name_mechanism
from probe.position.probes.emergence import probe_over_training
from probe.report import geometry
from probe.tracing import RESID_POST, trace

SITES = ["hook_embed", RESID_POST, "hook_attn_out", "attn.hook_z"]
STREAM = ["hook_embed", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
QUICK = {"n_bootstrap": 5}


@pytest.fixture(scope="module")
def models():
    config = DecoderConfig(d_vocab=19, n_ctx=16, n_layers=2, d_model=16, n_heads=2)
    return [Decoder(config, seed=seed).eval() for seed in (1, 0)]


@pytest.fixture(scope="module")
def pair(models, tokens):
    """A trace, and the control's."""
    return [trace(model, tokens, SITES) for model in models]


def named(figure, name):
    return [t for t in figure.data if t.name == name]


def test_shares_are_stacked_to_one(pair):
    rows = decompose_hidden(pair[0], STREAM, untrained=pair[1]).rows
    figure = geometry.plot_variance_shares(rows)
    heights = np.array([bar.y for bar in figure.data]).reshape(3, 4, 3)  # control, part, site
    np.testing.assert_allclose(heights.sum(1), 1)
    position = rows[(rows["metric"] == "share_position") & (rows["control"] == "none")]["value"]
    assert list(figure.data[0].y) == position.tolist() and list(figure.data[0].x)[1] == "0.resid_post"
    assert sum(a.text.endswith(" d") for a in figure.layout.annotations) == 9


def test_components_are_lines_against_position(pair):
    basis = decompose_hidden(pair[0], STREAM, untrained=pair[1], components=2).basis
    figure = geometry.plot_position_basis(basis)
    assert len(figure.data) == 3 * 2 * 2 and list(figure.data[0].x) == [*range(1, 10)]
    wanted = basis.query("site == 'hook_embed' and component == 1 and control == 'untrained'")["value"]
    assert list(named(figure, "component 2, untrained model")[0].y) == wanted.tolist()


@pytest.mark.parametrize("metric", ["hidden", "position_mean"])
def test_similarity_has_a_line_and_a_band_a_control(pair, metric):
    rows = neighbour_similarity(pair[0], STREAM, untrained=pair[1], max_lag=4, **QUICK)
    figure = geometry.plot_similarity_by_lag(rows, metric)
    assert len(figure.data) == 3 * 3 * 2
    line = named(figure, "trained model")[2]
    wanted = rows.query("site == @STREAM[2] and metric == @metric and control == 'none'")["value"]
    assert list(line.y) == wanted.tolist() and list(line.x) == [1, 2, 3, 4]


def test_the_power_law_goes_through_the_variance(pair):
    rows = variance_by_position(pair[0], untrained=pair[1], **QUICK)
    figure = geometry.plot_variance_against_position(rows)
    line, fit = named(figure, "trained model")[0], figure.data[2]
    assert list(line.x) == [*range(2, 11)]  # keys seen by positions 1, 2, …
    slope = np.polyfit(np.log(line.x), np.log(line.y), 1)[0]
    np.testing.assert_allclose(np.diff(np.log(fit.y)) / np.diff(np.log(fit.x)), slope)
    assert np.log(fit.y).mean() == pytest.approx(np.log(line.y).mean())
    assert f"{slope:.2f}".replace("-", "−") in figure.layout.annotations[0].text
    heads = variance_by_position(pair[0], ["blocks.1.attn.hook_z"], **QUICK)
    titles = [a.text for a in geometry.plot_variance_against_position(heads).layout.annotations]
    assert [t.split("<br>")[0] for t in titles] == ["1.attn.z[0]", "1.attn.z[1]"]


def test_what_has_no_variance_is_an_empty_panel(pair):
    rows = variance_by_position(pair[0], **QUICK)
    rows.loc[(rows["site"] == "blocks.0.hook_attn_out") & (rows["metric"] == "variance"), "value"] = 0.0
    assert len(geometry.plot_variance_against_position(rows).data) == 3  # band, line, fit of the other


def test_channels_are_points_with_their_numbers(pair):
    rows = position_channels(pair[0], STREAM, untrained=pair[1], top=4, **QUICK)
    figure = geometry.plot_channel_correlations(rows)
    points = named(figure, "trained model")[1]
    of = rows.query("site == @STREAM[1] and metric == 'spearman' and control == 'none'")
    np.testing.assert_allclose(points.y, of["value"].abs())
    assert list(points.text) == of["channel"].astype(str).tolist()
    assert min(points.error_y.array) >= -1e-12 and min(points.error_y.arrayminus) >= -1e-12


def test_readouts_show_every_intervention_and_verdict(models, tokens):
    rows = name_mechanism(models[0], tokens, **QUICK)
    figure = geometry.plot_mechanism_readouts(rows)
    names = rows[rows["mechanism"] == "position"]["intervention"].drop_duplicates()
    plain = named(figure, "fitted on normal sequences")[0]
    assert sorted(plain.y) == sorted(names.str.replace("_", " ")) and plain.y[-1] == "normal"
    assert min(plain.x) >= geometry.LOWEST
    told = figure.layout.annotations[0].text
    assert "variance decay" in told and told.count("</b>") == rows["mechanism"].nunique()


def test_a_run_is_drawn_above_its_loss(models, tokens):
    def measure(model, tokens):
        row = {"metric": "r2", "value": 0.5, "low": 0.4, "high": 0.6, "n": 3}
        return pd.DataFrame([row | {"site": site} for site in STREAM[1:]])

    rows = probe_over_training([(10, models[0]), (0, models[1])], tokens, measure=measure, **QUICK)
    figure = geometry.plot_position_against_loss(rows)
    assert [t.name for t in figure.data] == ["0.resid_post", "1.resid_post", "loss"]
    assert all(list(t.x) == [0, 10] for t in figure.data)
    assert list(figure.data[2].y) == rows[rows["metric"] == "loss"]["value"].tolist()


@pytest.mark.parametrize(
    "draw",
    [
        geometry.plot_variance_shares,
        geometry.plot_position_basis,
        geometry.plot_similarity_by_lag,
        geometry.plot_variance_against_position,
        geometry.plot_channel_correlations,
        geometry.plot_mechanism_readouts,
        geometry.plot_position_against_loss,
    ],
)
def test_no_rows_are_one_clear_line(draw):
    with pytest.raises(ProbeError, match="at least one row, got none"):
        draw(pd.DataFrame(columns=["metric", "site", "control"]))
