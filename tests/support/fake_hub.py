"""A hub on this machine: a folder served as huggingface_hub asks for it, and a list of what was asked for."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "1" * 40


class FakeHub(ThreadingHTTPServer):
    """``folders`` are models by name; ``gated`` names those whose terms nobody has accepted. ``asked`` are the paths of
    all requests, with their method and their token."""

    def __init__(self, folders: dict[str, Path], gated: tuple[str, ...] = ()):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folders, self.gated = folders, gated
        self.asked: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> set[str]:
        """The files whose contents were sent."""
        return {path.rsplit("/", 1)[1] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path}


@contextlib.contextmanager
def serve(folders: dict[str, Path], gated: tuple[str, ...] = ()) -> Iterator[FakeHub]:
    with FakeHub(folders, gated) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append((self.command, path, self.headers.get("Authorization")))
        parts = path.strip("/").removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name in self.server.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if name not in self.server.folders:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        folder = self.server.folders[name]
        if rest[1] not in ("main", COMMIT):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if rest[0] == "revision":
            siblings = [{"rfilename": path.name} for path in files]
            return self._json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []})
        if rest[0] == "tree":
            return self._json(
                [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _etag(path)} for path in files]
            )
        file = folder / rest[2]
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self._send(200, file.read_bytes(), {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
