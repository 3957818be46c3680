import inspect
import itertools

import numpy as np
import plotly.graph_objects as go
import plotly.io
import pytest

import probe.report as report
from probe.models.encodings import ENCODINGS
from probe.report.style import CONTROL_LABELS, GREY, LOOKS, OTHER_COLOURS, PALE, TEMPLATE, at_width, finish, look, panel

# Machado, Oliveira & Fernandes 2009, severity 1.0, on linear RGB.
COLOUR_BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
SEEN = {"normal": np.eye(3), **{name: np.array(matrix) for name, matrix in COLOUR_BLIND.items()}}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
SHARPLY = 11  # CIE76 in CIELAB; about 2.3 can just be noticed side by side


def lab(colour, seen=SEEN["normal"]):
    """CIELAB (D65) of an sRGB colour as it is seen."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(seen @ linear, 0, 1) / (XYZ @ np.ones(3))
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_the_oracle_knows_white_black_and_red():
    np.testing.assert_allclose(lab("#ffffff"), [100, 0, 0], atol=0.01)
    np.testing.assert_allclose(lab("#000000"), [0, 0, 0], atol=1e-9)
    np.testing.assert_allclose(lab("#ff0000"), [53.24, 80.09, 67.20], atol=0.02)  # Lindbloom's table


def test_every_encoding_has_a_look_of_its_own():
    assert set(LOOKS) == set(ENCODINGS)
    assert len({seen.colour for seen in LOOKS.values()}) == len({seen.symbol for seen in LOOKS.values()}) == len(LOOKS)
    assert not {GREY, PALE} & {look(name).colour for name in [*LOOKS, *map(str, range(200))]}  # those are of controls


@pytest.mark.parametrize("seen", SEEN)
def test_the_main_encodings_are_told_apart_by_everybody(seen):
    main = ("none", "learned", "sinusoidal", "t5", "alibi", "rotary")
    for a, b in itertools.combinations(main, 2):
        distance = np.linalg.norm(lab(LOOKS[a].colour, SEEN[seen]) - lab(LOOKS[b].colour, SEEN[seen]))
        assert distance > SHARPLY, (a, b, distance)


def test_all_can_be_seen_on_white():
    for colour in [*(seen.colour for seen in LOOKS.values()), *OTHER_COLOURS, GREY]:
        assert lab(colour)[0] < 75, colour


def test_other_names_keep_their_looks():
    assert look("pythia-70m") == look("pythia-70m")
    assert len({look(f"model-{i}") for i in range(60)}) > 30


def is_figure_function(name):
    found = getattr(report, name)
    return inspect.isfunction(found) and inspect.signature(found).return_annotation is go.Figure


FIGURES = sorted(filter(is_figure_function, report.__all__))


def test_figures_are_made_of_rows_and_take_no_path():
    assert len(FIGURES) > 35
    for name in FIGURES:
        parameters = inspect.signature(getattr(report, name)).parameters
        assert not {"path", "file", "filename", "folder", "out"} & set(parameters), name


def test_a_legend_has_room_below_at_every_width():
    figure = panel(200)
    for i in range(8):
        figure.add_scatter(x=[0, 1], y=[i, i], name=f"a rather long name of a line, number {i}")
    figure.update_xaxes(title="x")
    wide = finish(figure).layout.height
    narrow = at_width(figure, 300).layout.height
    assert narrow - wide >= 22 * 4  # one a line instead of two or three
    assert figure.layout.margin.b + figure.layout.margin.t + 200 == narrow
    assert at_width(figure, 960).layout.height == wide


def test_the_template_is_plotly_s_own_by_name():
    assert TEMPLATE in plotly.io.templates
    assert plotly.io.templates[TEMPLATE].layout.xaxis.automargin


def test_controls_are_named_wherever_they_are_drawn(probe_rows):
    figure = report.plot_probe_by_site(probe_rows, "r2")
    assert {t.name for t in figure.data} == {CONTROL_LABELS[c] for c in probe_rows["control"].unique()}


def test_n_stands_on_the_axes(probe_rows, accuracy_rows):
    rows = probe_rows.assign(n_test=[7] * len(probe_rows))
    title = report.plot_probe_by_site(rows, "r2").layout.yaxis.title.text
    assert title.replace("<br>", " ").endswith("(n = 7 sequences)")
    assert report.plot_accuracy_by_length(accuracy_rows).layout.yaxis.title.text == "exact match (n = 30 a length)"
    varied = accuracy_rows.assign(n=range(1000, 1000 + len(accuracy_rows)))
    assert "(n = 1,000–1,015 a length)" in report.plot_accuracy_by_length(varied).layout.yaxis.title.text
