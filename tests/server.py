"""A server of files on this machine, which can be told to misbehave."""

import hashlib
import http.server
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass
class Site:
    """A served folder.

    Attributes:
        folder: whose files are served.
        address: of it.
        requests: (path, range) of every request so far.
        cuts: for a path, the bytes after which its next connections end, one after the other.
        marked: whether it says by what a file is known again.
        ranges: whether it sends parts of files.
        careless: it sends the part that is asked for of whatever file it has now.
        lengths: whether it says how long a file is.
        answer: to everything, instead.
    """

    folder: Path
    address: str = ""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    marked: bool = True
    ranges: bool = True
    careless: bool = False
    lengths: bool = True
    answer: int = 0

    def __iter__(self):
        return iter((self.folder, self.address))


class _Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def log_message(self, *args):
        pass

    def do_GET(self):
        site, wanted = self.site, self.headers.get("Range")
        site.requests.append((self.path, wanted))
        path = site.folder / self.path.lstrip("/")
        if site.answer or not path.is_file():
            self.send_error(site.answer or 404)
            return
        content = path.read_bytes()
        mark, first = f'"{hashlib.sha256(content).hexdigest()[:16]}"', 0
        if wanted and site.ranges and (site.careless or self.headers.get("If-Range") == mark):
            first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        if first >= len(content) > 0:
            self.send_error(416)
            return
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if site.lengths:
            self.send_header("Content-Length", str(len(content) - first))
        if site.marked:
            self.send_header("ETag", mark)
        self.end_headers()
        cut = site.cuts.get(self.path, [])
        self.wfile.write(content[first:][: cut.pop(0) if cut else None])


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server of published files; the cache is a folder of the test."""
    own = Site(tmp_path / "site")
    (own.folder / "model").mkdir(parents=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": own}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", f"{own.address}/model")
    monkeypatch.setenv("MIT_SEMSEG_HOME", str(tmp_path / "cache"))
    yield own
    server.shutdown()
    server.server_close()
