"""A local HTTP server that can truncate the files it sends."""

import http.server
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass
class Site:
    """A folder that the server serves, its URL, and the requests so far."""

    folder: Path
    address: str = ""
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # (path, Range header)
    resumes: bool = True  # whether the server supports the Range header
    truncate: dict[str, int] = field(default_factory=dict)  # number of bytes to send, by path

    def __iter__(self):
        return iter((self.folder, self.address))


class _Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def log_message(self, *args):
        pass

    def do_GET(self):
        requested_range = self.headers.get("Range")
        self.site.requests.append((self.path, requested_range))
        path = self.site.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        wanted = (self.site.resumes and requested_range) or "0"
        content, start = path.read_bytes(), int(wanted.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.site.truncate.get(self.path)])


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Serve a folder at the URL `MIT_SEMSEG_MIRROR`, and use a download cache in `tmp_path`."""
    served = Site(tmp_path / "site")
    (served.folder / "model").mkdir(parents=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": served}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", f"{served.address}/model")
    monkeypatch.setenv("MIT_SEMSEG_HOME", str(tmp_path / "cache"))
    yield served
    server.shutdown()
    server.server_close()
