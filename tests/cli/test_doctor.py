import http.server
import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from probe import device
from probe.cli import doctor, main
from probe.cli.doctor import Requirement, hub, packages, requirements

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_network(monkeypatch):
    def refused(url):
        raise AssertionError(f"{url} was asked")

    monkeypatch.setattr(doctor, "_head", refused)


def test_a_line_is_a_finding_and_all_that_is_wanted_is_there(no_network, capsys):
    assert main(["doctor", "--offline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["doctor", "--offline", "--json"]) == 0
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(findings) and {finding["status"] for finding in findings} <= {"ok", "note"}
    for line, finding in zip(lines, findings, strict=True):
        assert line.split()[0] == finding["status"] and finding["what"] in line
    what = [finding["what"] for finding in findings]
    assert len(set(what)) == len(what)
    assert {"Python", "position-probe", "torch", "transformer-lens", "transformers", "plotly", "device"} <= set(what)
    assert {"memory", "disk", "cores", "float32 products", "browser", "hub's cache", "hub"} <= set(what)
    found = {finding["what"]: finding["found"] for finding in findings}
    assert found["torch"] == importlib.metadata.version("torch")
    assert float(re.match(r"[\d.]+", found["memory"])[0]) > 0


def test_what_is_missing_or_too_old_is_wrong_and_has_a_command(monkeypatch):
    there = {"position-probe": "1.0", "torch": "2.9.1+cu128", "rich": "15.0.0rc1", "numpy": "2.4"}

    def version(name):
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    wanted = [Requirement("torch", "2.13"), Requirement("rich", "15"), Requirement("plotly", "7.1")]
    found = {each.what: each for each in packages([*wanted, Requirement("ray", "2.50", "ray")])}
    assert found["torch"][1:3] == ("wrong", "2.9.1+cu128, and 2.13 or newer is wanted")
    assert found["torch"].advice.endswith(" -m pip install 'torch>=2.13'")
    assert found["plotly"][1:3] == ("wrong", "missing") and found["plotly"].advice.endswith("'plotly>=7.1'")
    assert found["rich"].status == found["numpy"].status == "ok"
    assert found["ray"][1:3] == ("note", "missing (only for position-probe[ray])")


def test_what_is_wanted_is_read_from_the_packages_own_metadata(monkeypatch):
    lines = ["torch>=2.13", "jinja2", "a.b-c[x]>=1.0,<2", 'ray>=2.50; extra == "ray"', "pytest>=9; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert requirements() == [
        *(Requirement("torch", "2.13"), Requirement("jinja2", ""), Requirement("a.b-c", "1.0")),
        Requirement("ray", "2.50", "ray"),
    ]


def test_it_runs_where_nothing_is_installed():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from probe.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r"^wrong +torch .*-m pip install '?torch", done.stdout, flags=re.MULTILINE)


def test_inexact_products_are_noted(no_network, monkeypatch, capsys):
    monkeypatch.setattr(device, "product_error", lambda *_: 3e-4)
    assert main(["doctor", "--offline"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "float32 products" in line]
    assert line.startswith("note") and "relative error 3e-04" in line and "set_float32_matmul_precision" in line


@pytest.fixture
def server():
    """A web server of this machine, and what it was asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.command)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_the_hub_is_asked_once_and_not_where_it_must_not_be(server, monkeypatch, tmp_path):
    endpoint, asked = server
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    cache, answer = hub()
    assert cache.found.endswith("none, not there yet")
    assert answer[1:3] == ("ok", f"{endpoint} answers") and asked == ["HEAD"]
    assert "--offline" in list(hub(offline=True))[1].found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in list(hub())[1].found
    assert asked == ["HEAD"]


def test_a_hub_out_of_reach_is_a_note_in_time(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        answer = list(hub(seconds=0.2))[1]
        assert answer.status == "note" and "timed out" in answer.found and time.monotonic() - started < 5
    for endpoint in (constants.ENDPOINT, "no address"):  # nobody listens there any more
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert list(hub(seconds=0.2))[1].status == "note"
    monkeypatch.setattr(doctor, "_head", lambda *_: time.sleep(30))  # a name that is being looked up
    assert "no answer in 0.2 s" in list(hub(seconds=0.2))[1].found


def test_the_cache_is_measured_and_links_count_once(monkeypatch, tmp_path):
    blobs = tmp_path / "models--a" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "b").touch()
    os.truncate(blobs / "b", 3 * 2**30)  # a file without contents: it takes no room
    (tmp_path / "models--a" / "link").symlink_to(blobs / "b")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert next(hub(offline=True)).found == f"{tmp_path}, 3.0 GiB, models: 1"


def test_a_browser_is_looked_for_under_its_names(monkeypatch):
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setattr("shutil.which", {"google-chrome": "/opt/google-chrome", "/own": "/own"}.get)
    assert doctor.browser()[1:3] == ("ok", "/opt/google-chrome")
    monkeypatch.setenv("BROWSER_PATH", "/own")
    assert doctor.browser().found == "/own"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert doctor.browser()[1:3] == ("note", "none of /own, chromium, chromium-browser, google-chrome")
