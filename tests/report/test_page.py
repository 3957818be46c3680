import base64
import gzip
import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import CHROMIUM, in_chromium

from probe.errors import ProbeError
from probe.limits import limits
from probe.report import (
    Section,
    plot_accuracy_by_length,
    plot_attention_maps,
    plot_census_grid,
    plot_census_losses,
    plot_construction_errors,
    plot_distance_matrix,
    plot_entropy_by_query,
    plot_f_rel_curves,
    plot_probe_by_site,
    plot_template_distances,
    render_page,
)
from probe.report.cells import Told, harmless_csv, table_csv
from probe.report.page import Line, Made

NASTY = "<script>document.title='pwned'</script>&\"'"
WORSE = "</script><img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
TOLD = [Told("0.1 [0.0, 0.2]", {"": 0.1, "low": 1 / 30}), "", *(Told(f"{x} of 9", {"": float(x)}) for x in "4321")]
TABLE = pd.DataFrame(
    {
        "metric": ["r2", NASTY, "exact_match", "b10", "b9", WORSE],
        "value": [0.5, 1e-12, None, 3.0, 0.5, -2.0],
        "exact match": TOLD,
        NASTY: [3, 4, 5, 6, 7, 8],
        "missing": [pd.NA, None, None, None, None, None],
    }
)  # fmt: skip
ROWS = pd.DataFrame(
    {
        "encoding": ["none", WORSE, "=1+1", 'a "quoted", name', "zwei\nZeilen", "ñ – ≤"],
        "value": [1 / 3, 1e-300, -0.0, np.nan, np.inf, 0.1 + 0.2],
        "layer": pd.array([0, 1, None, 3, 4, 5], dtype="Int64"),
    }
)
MADE = Made(
    f"probe study --load 'none={WORSE}'",
    {"study.json": json.dumps({"load": WORSE})},
    {"task": WORSE, "model": {"n_layers": 3}},
    {"torch": "2"},
)


@pytest.fixture(scope="session")
def rendered(
    accuracy_rows, probe_rows, map_rows, template_rows, pair_rows, construction_rows, census_rows, split, entropy_rows
):
    long = pd.DataFrame({"metric": [f"name {i}" for i in range(30)], "value": np.arange(30.0)})
    return render_page(
        f"A title {NASTY}",
        [f"Summary {NASTY}", Line(f"Lead {WORSE}", f"R² of {WORSE}", [WORSE])],
        [
            Section(
                f"One {WORSE}",
                [f"Exact match, R² and R² again {WORSE}"],
                figures=[
                    ("accuracy", plot_accuracy_by_length(accuracy_rows)),
                    (f"R² of {WORSE}", plot_probe_by_site(probe_rows, "r2")),
                ],
                tables=[(f"R² in a table {WORSE}", TABLE), ("", long)],
            ),
            Section(
                "Two",
                figures=[
                    ("maps", plot_attention_maps(map_rows, labels=[NASTY, *map(str, range(9))])),
                    ("templates", plot_template_distances(template_rows)),
                    ("pairs", plot_distance_matrix(pair_rows)),
                    ("constructions", plot_construction_errors(construction_rows)),
                ],
            ),
            Section(
                "Three",
                figures=[
                    ("census", plot_census_grid(census_rows)),
                    ("losses", plot_census_losses(census_rows)),
                    ("curves", plot_f_rel_curves(split.curves, split.rows)),
                    ("entropy", plot_entropy_by_query(entropy_rows)),
                ],
            ),
        ],
        rows=ROWS,
        made=MADE,
    )


def visible(page):
    return re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)


def test_the_page_needs_nothing_from_elsewhere(rendered):
    assert not re.search(r"(src|href)=[\"'](https?:)?//", visible(rendered))
    packed = re.search(r'<script type="application/octet-stream" id="plotly-js">(.*?)</script>', rendered)[1]
    assert "plotly.js v" in gzip.decompress(base64.b64decode(packed)).decode()[:200]
    assert len(rendered) < 2_500_000


def test_text_from_outside_is_escaped(rendered):
    assert "pwned" in visible(rendered)  # it is shown …
    assert "<script>document.title" not in rendered and "<img" not in rendered  # … as text


def test_a_script_that_is_not_the_pages_own_may_not_run(rendered):
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', rendered)[1]
    assert policy.startswith("default-src &#39;none&#39;; script-src &#39;sha256-") and "connect" not in policy
    scripts = [part for part in policy.split(";") if "script-src" in part]
    assert not any(word in scripts[0] for word in ("unsafe", "self", "http", "data:", "blob:"))


def test_numbers_read_well(rendered):
    for cell in ('"0.5">0.500<', '"1e-12">1.00e-12<', '"3.0">3<', '"0.1">0.1 [0.0, 0.2]<'):
        assert f"data-value={cell}/td>" in rendered


def test_equal_contents_make_equal_pages():
    sections = [Section("s", tables=[("t", TABLE)])]
    first, second = (render_page("t", ["s"], sections, rows=ROWS, made=MADE) for _ in range(2))
    assert first == second


def test_every_definition_stands_once(rendered):
    asked = set(re.findall(r'aria-describedby="(.*?)"', rendered))
    there = re.findall(r'<dd id="(definition-\d+)">', rendered)
    assert asked == set(there) and len(there) == len(asked)
    for name in ("r2", "exact_match", "value", "metric"):
        assert f"<dt>{name}</dt>" in rendered
    words = re.search(r"<p>(<a[^>]*>Exact match.*?)</p>", rendered, flags=re.DOTALL)[1]
    assert words.count("<a class") == 2 and words.count("R²") == 2  # the first time in a text


def test_rows_that_make_a_page_too_large_stay_beside_it():
    sections = [Section("s", ["t"])]
    within = render_page("t", [], sections, rows=ROWS)
    with limits(page_bytes=len(within) - 500):
        without = render_page("t", [], sections, rows=ROWS)
    assert 'id="rows-data"' in within and 'id="rows-data"' not in without
    assert "All 6 rows are in <code>rows.parquet</code> beside this page" in without


def test_a_page_without_sections_is_refused():
    with pytest.raises(ProbeError, match="a page wants at least one section"):
        render_page("t", [], [])


def test_an_installed_package_has_what_pages_are_made_of(tmp_path):
    root = Path(__file__).parents[2]
    for name in ("pyproject.toml", "README.md", "LICENSE", "probe", "constructions"):
        (tmp_path / name).symlink_to(root / name)
    build = "import setuptools.build_meta as b; print(b.build_wheel('wheels'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f"probe/report/page_assets/page.{ending}" for ending in ("html", "css", "js")} <= inside


SCRIPT = """
  const d = wide.document, all = (selector, of = d) => [...of.querySelectorAll(selector)];
  await until(() => all(".plot").every(plot => plot.querySelector(".main-svg")));
  const text = blob => blob.arrayBuffer().then(bytes => new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes));
  const found = { complaints: [...wide.complaints, ...phone.complaints] };
  found.requests = [wide, phone].flatMap(at => at.performance.getEntriesByType("resource")).map(e => e.name)
    .filter(name => !/^(data|blob):/.test(name));
  found.title = d.title;
  found.images = d.images.length;
  found.scripts = all("script").filter(each => !each.type).length;
  found.plots = all(".plot").length;
  found.drawn = all(".plot").filter(plot => plot.querySelector(".main-svg")).length;
  found.cells = all(".heatmaplayer image, .heatmaplayer path").length;

  // A table is sorted up, down, and back.
  const table = d.getElementById("table-1-1"), heads = all("thead button", table);
  const column = i => [...table.tBodies[0].rows].map(row => row.cells[i].textContent);
  found.sorted = [0, 1, 2].map(i => [0, 1, 2].map(() => {
    heads[i].click();
    return [table.tHead.rows[0].cells[i].getAttribute("aria-sort"), column(i)];
  }));
  heads[0].click(); heads[1].click();
  found.marks = [...table.tHead.rows[0].cells].map(cell => cell.getAttribute("aria-sort"));

  // What the tab key reaches, in its order.
  const reached = all("a[href], button, input, summary, [tabindex='0']")
    .filter(each => each.tabIndex >= 0 && each.offsetParent);
  const place = selector => reached.findIndex(each => each.matches(selector));
  found.order = [".skip", "[data-download=rows-data]", "nav a", "main .term", "[data-picture]", "#table-1-1 .sort",
    "#table-1-1 tbody .term", "[data-copy]", "[data-download=file-1-data]"].map(place);
  const focused = [heads[0], all("tbody .term", table)[0], all("[data-download]")[0]];
  found.focused = focused.map(each => { each.focus(); return d.activeElement === each; });

  // A definition shows by the keyboard, by pointing and by a tap, and goes away.
  const tip = d.getElementById("tip"), term = all("main p .term")[0], seen = () => tip.hidden ? "" : tip.textContent;
  const key = name => d.body.dispatchEvent(new wide.KeyboardEvent("keydown", { key: name, bubbles: true }));
  const point = at => at.dispatchEvent(new wide.PointerEvent("pointerover", { bubbles: true }));
  term.focus(); found.tips = [seen()];
  key("Escape"); found.tips.push(seen());
  point(term); found.tips.push(seen());
  point(tip); found.tips.push(seen());
  point(d.body); found.tips.push(seen());
  const hash = wide.location.hash; term.click(); found.tips.push(seen());
  heads[1].focus(); found.tips.push(seen());
  found.stayed = wide.location.hash === hash;
  found.described = d.getElementById(term.getAttribute("aria-describedby")).textContent;

  // Rows are filtered.
  const filter = d.querySelector("input[type=search]");
  filter.value = "name 1"; filter.dispatchEvent(new wide.Event("input", { bubbles: true }));
  const left = all("#table-1-2 tbody tr").filter(row => row.offsetParent);
  found.filtered = [filter.closest("p").querySelector("output").textContent, left.length];

  // Downloads.
  for (const name of ["rows-data", "table-1-1-data", "file-1-data"]) d.querySelector(`[data-download=${name}]`).click();
  await until(() => wide.saved.length === 3);
  d.querySelector("[data-picture=figure-1-1]").click();
  d.querySelector("[data-copy]").click();
  await until(() => wide.saved.length === 4 && d.querySelector("[data-copy]").textContent !== "Copy");
  found.saved = await Promise.all(wide.saved.map(async blob => [blob.filename, await text(blob)]));
  found.copied = d.querySelector("[data-copy]").textContent;
  found.selected = d.getSelection().toString();

  found.phone = { width: phone.innerWidth, scroll: phone.document.documentElement.scrollWidth,
    contents: phone.document.querySelector("nav details").open };
  found.late = [...wide.complaints, ...phone.complaints];
  return found;
"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_does_all_that_the_page_offers_and_complains_of_nothing(rendered, tmp_path):
    found = in_chromium(rendered, SCRIPT, tmp_path)
    assert found["complaints"] == [] and found["late"] == [] and found["requests"] == []
    assert found["title"] == f"A title {NASTY}"  # as text: nothing that was hidden in names ran
    assert found["images"] == 0 and found["scripts"] == 2
    assert found["plots"] == found["drawn"] == 10 and found["cells"] >= 12

    metric, value, exact = found["sorted"]
    start = TABLE["metric"].tolist()
    up = ["b9", "b10", "exact_match", "r2"]
    assert [order for order, _ in metric] == ["ascending", "descending", "none"]
    assert [cell for cell in metric[0][1] if cell in up] == up and metric[2][1] == start
    assert metric[1][1] == metric[0][1][::-1]
    assert [cells for _, cells in value] == [
        ["-2.000", "1.00e-12", "0.500", "0.500", "3.000", ""],
        ["3.000", "0.500", "0.500", "1.00e-12", "-2.000", ""],
        ["0.500", "1.00e-12", "", "3.000", "0.500", "-2.000"],
    ]
    assert [cells for _, cells in exact][:2] == [
        ["0.1 [0.0, 0.2]", "1 of 9", "2 of 9", "3 of 9", "4 of 9", ""],
        ["4 of 9", "3 of 9", "2 of 9", "1 of 9", "0.1 [0.0, 0.2]", ""],
    ]
    assert found["marks"] == ["none", "ascending", "none", "none", "none"]

    assert found["order"] == sorted(found["order"]) and found["order"][0] == 0 and all(found["focused"])
    said = found["described"]
    assert said.startswith("The share of sequences whose completion equals the target")
    assert found["tips"][:6] == [said, "", said, said, "", said] and found["tips"][6].startswith("The number itself")
    assert found["stayed"]
    assert found["filtered"] == ["12 of 30", 12]

    (rows, table, settings, picture) = found["saved"]
    assert rows == ["rows.csv", harmless_csv(ROWS)]
    assert table[0].endswith(".csv") and table[1] == table_csv(TABLE)
    assert settings == ["study.json", MADE.files["study.json"]]
    assert picture[0].endswith(".svg") and picture[1].startswith("<svg")
    assert found["copied"] == "Copied" or (found["copied"], found["selected"]) == ("Selected", MADE.command)

    phone = found["phone"]
    assert phone["width"] == 360 and phone["scroll"] <= 360 and not phone["contents"]


def test_text_that_a_spreadsheet_would_run_is_made_harmless_in_csv():
    told = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\tx", "-0.5", "a=b", "", None]
    rows = pd.DataFrame({"=head": told, "value": [-1.5, *range(8)], "flag": True})
    read = pd.read_csv(io.StringIO(harmless_csv(rows)), keep_default_na=False, dtype=str)
    assert list(read) == ["'=head", "value", "flag"]
    assert read["'=head"].tolist() == [
        *("'=1+1", "'+cmd|' /C calc'!A0", "'-2+3", "'@SUM(A1)", "'\tx"),
        *("-0.5", "a=b", "", ""),
    ]
    assert read["value"][0] == "-1.5"
    plain = rows.assign(**{"=head": "a"}).rename(columns={"=head": "head"})
    assert harmless_csv(plain) == plain.to_csv(index=False)
    assert table_csv(rows.astype(object)).startswith("'=head,value,flag\n'=1+1,")
    page = render_page("Page", [], [Section("A", ["a"])], rows=rows)
    (packed,) = re.findall(r'data-file="rows.csv">([A-Za-z0-9+/=]+)<', page)
    assert gzip.decompress(base64.b64decode(packed)).decode() == harmless_csv(rows)


@pytest.mark.parametrize("name", ["a", "b", "of", "run", "other", "mean", "p", "trained", "uniform_scale"])
def test_a_models_name_is_not_taken_for_a_term(name):
    """A head, or a cell under "model", that is a model's name is what its user calls it."""
    rows = pd.DataFrame({"model": [name, "rotary"], "metric": "r2", "value": [0.1, 0.2]})
    by_models = pd.DataFrame([("r2", 0.1, 0.2)], columns=["metric", name, "rotary"]).rename_axis(columns="model")
    sections = [Section("S", tables=[("By model.", by_models), ("Rows.", rows)])]
    page = render_page("t", [], sections, rows=rows)
    # "metric", "model", "value", "r2" and "rotary" are defined, and nothing else.
    terms = re.findall(r"<dt>(.*?)</dt>", page)
    assert set(terms) == {"metric", "model", "value", "r2", "rotary (encoding)"}
