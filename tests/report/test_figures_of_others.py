"""``probe figures`` reads pages that others may have made or damaged, and requests nothing."""

import base64
import gzip
import http.server
import json
import threading
import time
from typing import ClassVar

import plotly.graph_objects as go
import pytest
from browser import CHROMIUM, in_chromium
from hostile import command, fresh

from probe.errors import ProbeError
from probe.limits import Limits
from probe.report import Section, render_page
from probe.report.export import figures_of, pictures, standalone

FIGURE = {"data": [{"type": "scatter", "x": [1, 2], "y": [1, 2]}], "layout": {"height": 300}}


def page_of(content, name="a"):
    """A page as ours, with anything in place of a figure."""
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content).encode()
    packed = content if isinstance(content, str) else base64.b64encode(gzip.compress(content)).decode()
    return (
        f'<script type="application/octet-stream" data-plot="figure-1-1" data-file="{name}">{packed}</script>'
    ).encode()


def with_layout(**layout):
    return FIGURE | {"layout": layout}


WHOLE = base64.b64encode(gzip.compress(json.dumps(FIGURE).encode())).decode()
FOREIGN = {
    "no base64": page_of("a"),
    "letters between": page_of(WHOLE[:8] + "é" + WHOLE[8:]),
    "no gzip": page_of(base64.b64encode(b"hello").decode()),
    "cut off": page_of(WHOLE[: len(WHOLE) // 8 * 4]),
    "one byte changed": page_of(WHOLE[:-12] + ("A" if WHOLE[-12] != "A" else "B") + WHOLE[-11:]),
    "empty": page_of(""),
    "no JSON": page_of(b"{"),
    "no UTF-8": page_of(b'{"data": "\xff"}'),
    "nested": page_of(b"[" * 100_000),
    "a list": page_of([1]),
    "null": page_of(None),
    "no data": page_of({"layout": {}}),
    "data of another kind": page_of({"data": 3}),
    "a trace of another kind": page_of({"data": [3]}),
    "layout of another kind": page_of({"data": [], "layout": 3}),
    "frames": page_of({**FIGURE, "frames": []}),
    "an unknown option": page_of(with_layout(nonsense=1)),
    "a value of another kind": page_of(with_layout(height="high")),
    "an image": page_of(with_layout(images=[{"source": "data:image/png;base64,"}])),
    "an image of the template": page_of(with_layout(template={"layout": {"images": [{"source": "/a.png"}]}})),
    "an address": page_of(with_layout(title={"text": "<a href='x'>x</a>"})),
    "a server": page_of(with_layout(title={"text": "http://example.org"})),
    "a map": page_of(with_layout(mapbox={"style": "open-street-map"})),
    "a trace that draws a map": page_of({"data": [{"type": "scattermapbox", "lat": [0], "lon": [0]}]}),
    "meta of another kind": page_of(with_layout(meta=[1])),
    "no height": page_of(with_layout(meta={"drawn": 0})),
    "a height of another kind": page_of(with_layout(meta={"drawn": "x"})),
    "a title of another kind": page_of(with_layout(annotations=[{"yref": "paper", "yanchor": "bottom"}])),
    "many values": page_of(b'{"data": [' + b"{}," * 2**20 + b"{}]}"),
    "a page of tags": b'<script type="application/octet-stream" data-plot="' * 10**5,
    "nothing": b"",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_page_that_is_not_ours_is_refused_in_one_line(name):
    with fresh() as folder:
        (folder / "report.html").write_bytes(FOREIGN[name])
        assert command("figures", folder, "--formats", "")
        assert [path.name for path in folder.iterdir()] == ["report.html"]


def test_a_bomb_is_refused_before_it_is_unpacked():
    """200 MB of blanks in 200 kB: neither the memory nor the time of more than a figure's bytes."""
    unpacker = gzip.compress(b" " * 2 * 10**8, compresslevel=1)
    with fresh() as folder:
        (folder / "report.html").write_bytes(page_of(base64.b64encode(unpacker).decode()))
        started = time.process_time()
        assert f"at most {Limits().figure_bytes} bytes" in command("figures", folder, "--formats", "")
        assert time.process_time() - started < 3


@pytest.mark.parametrize("name", ["x" * 400, "λ" * 140, "..", "", "a/../../b", "&#x2f;etc"])
def test_names_of_figures_are_names_of_files(name, tmp_path):
    (tmp_path / "report.html").write_bytes(page_of(FIGURE, name))
    (found,) = figures_of((tmp_path / "report.html").read_text())
    assert "/" not in found and not found.startswith(".") and 0 < len(f"{found}.html".encode()) < 256


def test_a_page_of_ours_is_read():
    figure = go.Figure(FIGURE)
    page = render_page("t", [], [Section("s", figures=[("one", figure)])])
    (found,) = figures_of(page).values()
    assert json.loads(found.to_json())["data"] == json.loads(figure.to_json())["data"]
    with pytest.raises(ProbeError, match="at most 500 figures"):
        figures_of(page_of(FIGURE).decode() * 501)


class _Counting(http.server.BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = http.server.HTTPServer(("127.0.0.1", 0), _Counting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _Counting.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_written_page_draws_and_requests_nothing(server, tmp_path):
    """Also of a figure with an image of a server, which no page of ours has."""
    figure = go.Figure(FIGURE | {"layout": {"images": [{"source": f"{server}/a.png", "xref": "paper", "yref": "paper",
                                                       "sizex": 1, "sizey": 1}]}})  # fmt: skip
    files = standalone({"a": figure})
    (tmp_path / "plotly.min.js").write_text(files["plotly.min.js"], encoding="utf-8")
    script = """
        await until(() => wide.document.querySelector(".js-line") && wide.complaints.length);
        return [wide.document.querySelectorAll(".js-line").length, wide.complaints];
    """
    whole = f"return {{found: await (async () => {{ {script} }})()}}"
    drawn, complaints = in_chromium(files["a.html"], whole, tmp_path)["found"]
    assert drawn == 1 and all(c.startswith("img-src") for c in complaints) and complaints
    assert _Counting.asked == []


def test_pictures_are_drawn_without_the_script_of_a_server(monkeypatch):
    """kaleido requests MathJax for every picture unless it is told where else it is."""
    import plotly.io

    seen = []
    monkeypatch.setattr(
        "plotly.io.write_images",
        lambda figures, files, **_: [seen.append(plotly.io.defaults.mathjax), *[f.write_bytes(b"") for f in files]],
    )
    assert set(pictures({"a": go.Figure(FIGURE)}, ["svg"])) == {"a.svg"}
    assert seen[0].startswith("file:///") and plotly.io.defaults.mathjax is None
