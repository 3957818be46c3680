import math

import numpy as np
import pytest

from probe.attention import stream
from probe.errors import ProbeError
from probe.report import attention


def test_a_grid_has_a_cell_a_head(census_rows):
    none = census_rows[(census_rows["model"] == "none") & (census_rows["metric"] == "sink")]
    figure = attention.plot_head_grid(none, "sink")
    np.testing.assert_array_equal(figure.data[0].z, none["value"].to_numpy().reshape(2, 2))
    with pytest.raises(ProbeError, match="one row a head"):
        attention.plot_head_grid(census_rows)


def test_the_census_shows_labels_and_tells_every_score(census_rows):
    figure = attention.plot_census_grid(census_rows)
    assert len(figure.data) == 3
    of = census_rows[census_rows["model"] == "none"]
    shade = of[of["metric"] == "explained_variance"]["value"].to_numpy().reshape(2, 2)
    np.testing.assert_array_equal(figure.data[0].z, shade)
    labels = of.drop_duplicates(["layer", "head"])["label"].map(lambda x: attention.SHORT_LABELS.get(x, x))
    assert np.array(figure.data[0].text).ravel().tolist() == labels.tolist()
    told = figure.data[0].customdata[1][0]
    for metric in of["metric"].unique():
        assert f"{metric}: " in told


def test_losses_have_a_point_a_head_and_ablation(census_rows):
    figure = attention.plot_census_losses(census_rows)
    points = [t for t in figure.data if t.mode == "markers"]
    assert len(points) == 3 * 3 and list(points[0].x) == ["0.0", "0.1", "1.0", "1.1"]
    wanted = census_rows[(census_rows["model"] == "none") & (census_rows["metric"] == "loss_uniform")]
    uniform = next(t for t in points if "uniform attention" in t.name)
    assert list(uniform.y) == wanted["value"].tolist()
    assert list(uniform.error_y.array) == (wanted["high"] - wanted["value"]).tolist()


def test_f_rel_is_drawn_over_alibi_and_t5(split):
    figure = attention.plot_f_rel_curves(split.curves, split.rows)
    first = [t for t in figure.data if t.xaxis in (None, "x")]
    assert [t.name for t in first if t.name] == ["f_rel", "ALiBi's nearest line", "T5's nearest bias"]
    f_rel = split.curves.query("curve == 'f_rel' and layer == 0 and head == 0").sort_values("index")
    assert list(first[1].y) == f_rel["value"].tolist()[:9]  # of 10 distances the furthest is left out
    line = np.array(first[2].y)
    slope = split.rows.query("metric == 'slope' and layer == 0 and head == 0")["value"].item()
    np.testing.assert_allclose(np.diff(line), -slope)


def test_entropy_stands_below_its_bound(entropy_rows, decoders, tokens):
    figure = attention.plot_entropy_by_query(entropy_rows)
    lines = [t for t in figure.data if t.name.startswith("heads of layer")]
    assert len(lines) == 3 * 4
    bound = next(t for t in figure.data if t.name.startswith("uniform"))
    assert list(bound.y) == [math.log(t + 1) for t in range(10)]
    assert all(np.all(np.array(line.y) <= np.array(bound.y) + 1e-9) for line in lines)
    # What streaming gives is drawn by the same function, and is the same.
    streamed = attention.plot_entropy_by_query(stream(decoders["none"], tokens).rows())
    np.testing.assert_allclose(streamed.data[0].y, lines[0].y, atol=1e-5)


def test_names_from_outside_are_text_not_markup(census_rows, entropy_rows):
    for figure in (
        attention.plot_census_grid(census_rows),
        attention.plot_census_losses(census_rows),
        attention.plot_entropy_by_query(entropy_rows),
    ):
        assert "<script>document" not in figure.to_html(include_plotlyjs=False)


def test_no_rows_are_one_clear_line(census_rows, entropy_rows, split):
    for draw in (
        lambda: attention.plot_census_grid(census_rows[:0]),
        lambda: attention.plot_census_losses(census_rows[:0]),
        lambda: attention.plot_entropy_by_query(entropy_rows[:0]),
        lambda: attention.plot_f_rel_curves(split.curves[:0], split.rows),
        lambda: attention.plot_head_grid(census_rows[:0]),
    ):
        with pytest.raises(ProbeError, match="needs at least one row, got none"):
            draw()
