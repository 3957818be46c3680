import base64
import gzip
import json
import re
import shutil
import subprocess

import pandas as pd
import pytest

from probe.errors import ProbeError
from probe.report import (
    Section,
    accuracy_by_length,
    attention_maps,
    census_grid,
    census_losses,
    construction_errors,
    distance_matrix,
    entropy_by_query,
    f_rel_curves,
    probe_by_site,
    render_page,
    template_distances,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NASTY = "<script>document.title='pwned'</script>&\"'"


@pytest.fixture(scope="session")
def page(
    accuracy_rows, probe_rows, map_rows, template_rows, pair_rows, construction_rows, census_rows, split, entropy_rows
):
    table = pd.DataFrame({"name": [NASTY, "b"], "value": [0.5, 1e-12], "n": [3, 4], "missing": [pd.NA, None]})
    return render_page(
        f"A title {NASTY}",
        [f"Summary {NASTY}"],
        [
            Section(
                "One",
                [f"Text {NASTY}"],
                figures=[
                    ("accuracy", accuracy_by_length(accuracy_rows)),
                    ("probes", probe_by_site(probe_rows, "r2")),
                ],
                tables=[("a table", table)],
            ),
            Section(
                "Two",
                figures=[
                    ("maps", attention_maps(map_rows, labels=[NASTY, *map(str, range(9))])),
                    ("templates", template_distances(template_rows)),
                    ("pairs", distance_matrix(pair_rows)),
                    ("constructions", construction_errors(construction_rows)),
                ],
            ),
            Section(
                "Three",
                figures=[
                    ("census", census_grid(census_rows)),
                    ("losses", census_losses(census_rows)),
                    ("curves", f_rel_curves(split.curves, split.shares)),
                    ("entropy", entropy_by_query(entropy_rows)),
                ],
            ),
        ],
    )


def test_the_page_needs_nothing_from_elsewhere(page):
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=[\"'](https?:)?//", outside)
    packed = re.search(r'<script type="application/octet-stream" id="plotly-js">(.*?)</script>', page)[1]
    assert "plotly.js v" in gzip.decompress(base64.b64decode(packed)).decode()[:200]
    assert len(page) < 2_500_000


def test_text_from_outside_is_escaped(page):
    outside = re.sub(r"<script[^>]*>.*?</script>", "", page, flags=re.DOTALL)
    assert "pwned" in outside  # it is shown …
    assert "<script>document.title" not in page  # … as text


def test_numbers_read_well(page):
    for cell in (">0.500<", ">1.00e-12<", ">3<"):
        assert f'<td class="number"{cell}/td>' in page


def test_a_page_without_sections_is_refused():
    with pytest.raises(ProbeError, match="a page wants at least one section"):
        render_page("t", [], [])


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_draws_everything_and_complains_of_nothing(page, tmp_path):
    # What the page did is written into it by a last script, and read from the DOM that the browser prints.
    watch = """<script>window.complaints = [];
      addEventListener("error", e => complaints.push(String(e.message)));
      console.error = (...a) => complaints.push(a.join(" "));</script>"""
    tell = """<script>addEventListener("load", () => setTimeout(() => {
      const report = document.createElement("pre"); report.id = "report";
      report.textContent = JSON.stringify({
        complaints, title: document.title, drawn: document.querySelectorAll(".plot .main-svg").length,
        divs: document.querySelectorAll(".plot").length,
        cells: document.querySelectorAll(".heatmaplayer image, .heatmaplayer path").length,
        requests: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
      }); document.body.append(report); }, 3000));</script>"""
    watched = page.replace("<head>", "<head>" + watch, 1).replace("</body>", tell + "</body>", 1)
    path = tmp_path / "page.html"
    path.write_text(watched, encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]
    dom = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    report = re.search(r'<pre id="report">(.*?)</pre>', dom, flags=re.DOTALL)
    assert report, "the page's last script did not run"
    found = json.loads(report[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["complaints"] == []
    assert found["requests"] == []
    assert found["divs"] == 10 and found["drawn"] >= 10
    assert found["cells"] >= 12
    assert found["title"].startswith("A title <script>")  # as text: it did not run
