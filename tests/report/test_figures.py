import numpy as np
import pandas as pd
import pytest

from probe.errors import ProbeError
from probe.report import accuracy, attention, plot_construction_errors, plot_learned_heads, position, style


def test_accuracy_is_drawn_as_it_is(accuracy_rows):
    figure = accuracy.plot_accuracy_by_length(accuracy_rows, train_length=5)
    line = next(t for t in figure.data if t.name == "none")
    assert list(line.x) == list(range(1, 9))
    assert list(line.y) == accuracy_rows["value"][:8].tolist()
    band = next(t for t in figure.data if t.legendgroup == "none" and t.fill == "toself")
    assert list(band.y) == accuracy_rows["high"][:8].tolist() + accuracy_rows["low"][:8].tolist()[::-1]
    assert figure.layout.shapes[0].x0 == 5.5


def test_an_encoding_has_one_colour_everywhere(accuracy_rows, probe_rows):
    for encoding in ("none", "t5", "my own"):
        assert style.colour(encoding) == style.colour(encoding)
    a = next(t for t in accuracy.plot_accuracy_by_length(accuracy_rows).data if t.name == "none")
    b = position.plot_probe_by_site(probe_rows, "r2").data[0]
    assert a.line.color == b.line.color == style.colour("none")


def test_probe_scores_stand_beside_their_controls(probe_rows):
    figure = position.plot_probe_by_site(probe_rows, "r2")
    assert len(figure.data) == 8
    assert [t.name for t in figure.data if t.showlegend] == [
        "trained model",
        "untrained model",
        "token embedding alone",
        "shuffled positions",
    ]
    first = figure.data[0]
    assert list(first.y) == [0.9, 0.9]
    assert first.error_y.array == pytest.approx((0.05, 0.05))
    assert first.error_y.arrayminus == pytest.approx((0.1, 0.1))
    assert list(first.x) == ["embed", "0.resid_post"]


def test_attention_maps_hold_pattern_template_and_difference(map_rows, traces):
    figure = attention.plot_attention_maps(map_rows)
    assert len(figure.data) == 2 * 2 * 3
    pattern, template, difference = (np.asarray(figure.data[i].z, dtype=float) for i in range(3))
    wanted = traces["none"].pattern(0)[6:, 0].mean(0).numpy()
    future = np.triu(np.ones((10, 10), dtype=bool), 1)
    np.testing.assert_allclose(pattern[~future], wanted[~future], atol=1e-6)
    assert np.isnan(pattern[future]).all()
    np.testing.assert_allclose(np.nansum(template, axis=1), 1)
    np.testing.assert_allclose(difference[~future], (pattern - template)[~future])
    assert figure.layout.coloraxis2.cmax == -figure.layout.coloraxis2.cmin > 0


def test_a_distance_matrix_is_symmetric_and_shows_seeds_on_its_diagonal(pair_rows):
    seeds = pd.DataFrame([{"model_a": "none", "model_b": "none", "value": 0.01, "low": 0.0, "high": 0.02}])
    figure = attention.plot_distance_matrix(pd.concat([pair_rows, seeds], ignore_index=True))
    z = np.asarray(figure.data[0].z, dtype=float)
    np.testing.assert_array_equal(z, z.T)
    assert np.diag(z)[0] == 0.01 and np.isnan(np.diag(z)[1:]).all()
    assert [row[i] for i, row in enumerate(figure.data[0].text)] == ["0.010<br>[0.000, 0.020]", "one seed", "one seed"]
    assert z[0, 1] == pair_rows["value"].iloc[0]


def test_template_distances_have_a_point_a_head(template_rows):
    figure = attention.plot_template_distances(template_rows)
    assert sum(len(t.x) for t in figure.data) == len(template_rows)


def test_errors_are_drawn_as_a_share_of_their_tolerance(construction_rows):
    rows = construction_rows.copy()
    rows.loc[0, "largest_error"] = 0.2
    rows.loc[1, ["largest_error", "tolerance"]] = [1e-9, 0.0]
    first, second = plot_construction_errors(rows).data
    assert list(first.x) == [2.0, 1e3]  # beyond the tolerance, and wrong where no error is allowed
    assert list(second.x) == [1e-12, pytest.approx(1e-8)]  # exact, and well within


def test_names_from_outside_are_text_not_markup(accuracy_rows, probe_rows, template_rows, pair_rows, construction_rows):
    drawn = [
        accuracy.plot_accuracy_by_length(accuracy_rows),
        position.plot_probe_by_site(probe_rows, "r2"),
        attention.plot_template_distances(template_rows),
        attention.plot_distance_matrix(pair_rows),
        plot_construction_errors(construction_rows),
    ]
    for figure in drawn:
        assert "<script>document" not in figure.to_html(include_plotlyjs=False)


def test_no_rows_are_one_clear_line(accuracy_rows):
    for draw in (
        accuracy.plot_accuracy_by_length,
        attention.plot_distance_matrix,
        plot_construction_errors,
        attention.plot_template_distances,
        attention.plot_attention_maps,
    ):
        with pytest.raises(ProbeError, match="needs at least one row, got none"):
            draw(accuracy_rows[:0])


def test_learned_heads_are_the_rows_of_the_table():
    from pathlib import Path

    import constructions

    rows = pd.read_csv(Path(constructions.__file__).parent / "results" / "learnability.csv")
    figure = plot_learned_heads(rows)
    kept = rows[(rows["metric"] == "slope") & (rows["layer"] == 0) & (rows["start"] == "random")]
    assert sum(len(t.x) for t in figure.data) == len(kept)
    with_bos = next(t for t in figure.data if t.name.startswith("with &lt;bos&gt;, trained"))
    assert max(abs(x + 1) for x in with_bos.x) < 0.15  # what the table's page says
