import io
import json
import re

import plotly.graph_objects as go
import pytest
from browser import CHROMIUM
from PIL import Image

from probe.cli import main
from probe.errors import ProbeError
from probe.report import Section, plot_accuracy_by_length, plot_attention_maps, plot_probe_by_site, render_page
from probe.report.export import figures_of, pictures, print_size, standalone
from probe.report.style import named

wants_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def drawn(accuracy_rows, probe_rows, map_rows):
    return named({
        "accuracy": plot_accuracy_by_length(accuracy_rows),
        "probes": plot_probe_by_site(probe_rows, "r2"),
        "maps": plot_attention_maps(map_rows),
    })  # fmt: skip


@pytest.fixture
def folder(drawn, tmp_path):
    page = render_page("t", [], [Section("s", figures=[(name, figure) for name, figure in drawn.items()])])
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    return tmp_path


def test_a_page_gives_its_figures_back(drawn, folder):
    found = figures_of((folder / "report.html").read_text(encoding="utf-8"))
    assert list(found) == list(drawn)
    for name, figure in found.items():
        assert json.loads(figure.to_json()) == json.loads(drawn[name].to_json())


def test_names_from_a_page_stay_in_their_folder():
    figure = go.Figure(layout={"meta": {"name": "../../a <b> & 'c'"}})
    page = render_page("t", [], [Section("s", figures=[("one", figure), ("two", figure)])])
    assert list(figures_of(page)) == ["a-b-c-", "a-b-c--2"]  # numbered where alike


def test_what_is_no_report_is_refused(tmp_path, capsys):
    with pytest.raises(ProbeError, match="no figures"):
        figures_of("<html></html>")
    assert main(["figures", str(tmp_path)]) == 2
    assert "no such file; probe figures needs a report" in capsys.readouterr().err


def test_text_has_its_size_in_print(drawn):
    one, two = (print_size(drawn["accuracy"], width) for width in (84, 174))
    assert one[2] == two[2] == pytest.approx(7)
    assert two[1] / one[1] == pytest.approx(174 / 84)
    before = json.loads(drawn["maps"].to_json())
    crowded = print_size(drawn["maps"], 40)
    assert crowded[2] < 7 and crowded[1] > 500
    assert json.loads(drawn["maps"].to_json()) == before


def test_every_figure_is_html_without_a_browser(folder, capsys, monkeypatch):
    monkeypatch.setattr("plotly.io.write_images", missing_browser)
    assert main(["figures", str(folder), "--only", "probes,maps"]) == 2
    said = capsys.readouterr()
    assert "2 figures as HTML" in said.out
    wanted = "pictures want a browser, and there is none: apt install chromium, or plotly_get_chrome -y"
    assert said.err == f"probe: {wanted}\n"
    assert {p.name for p in (folder / "figures").iterdir()} == {"probes.html", "maps.html", "plotly.min.js"}


def missing_browser(*arguments, **options):
    raise RuntimeError("Kaleido requires Google Chrome to be installed. …")


def test_without_kaleido_the_extra_is_named(drawn, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ProbeError, match=re.escape("pip install 'position-probe[figures]'")):
        pictures(drawn)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "accuarcy"], "unknown figure 'accuarcy'"),
        (["--formats", "png,eps"], "formats are png, svg, pdf, got eps"),
        (["--width", "3"], "width must be 20 to 2000 mm"),
    ],
)
def test_wrong_wishes_are_one_line(folder, capsys, options, said):
    assert main(["figures", str(folder), *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.browser
@wants_browser
def test_pictures_are_as_wide_as_the_column(folder, tmp_path, capsys):
    to = tmp_path / "print"
    wishes = ["--only", "accuracy,maps", "--width", "84", "--dpi", "254", "--to", str(to)]
    assert main(["figures", str(folder), *wishes]) == 0
    assert "maps: its text has" in capsys.readouterr().out
    for name in ("accuracy", "maps"):
        with Image.open(io.BytesIO((to / f"{name}.png").read_bytes())) as image:
            assert image.width == pytest.approx(840, abs=1)  # 84 mm at 10 pixels a mm
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20
        svg = (to / f"{name}.svg").read_text(encoding="utf-8")
        assert float(re.search(r'<svg[^>]* width="([\d.]+)"', svg)[1]) == pytest.approx(84 / 25.4 * 96, abs=0.1)
        box = re.search(rb"/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)\]", (to / f"{name}.pdf").read_bytes())
        assert float(box[1]) == pytest.approx(84 / 25.4 * 72, abs=1)
    assert not list(to.glob(".*"))


def test_html_files_share_one_script(drawn):
    files = standalone(drawn)
    assert set(files) == {"accuracy.html", "probes.html", "maps.html", "plotly.min.js"}
    for name, text in files.items():
        if name.endswith("html"):
            assert 'src="plotly.min.js"' in text and '"modeBarButtonsToRemove": ["sendChartToCloud"' in text
