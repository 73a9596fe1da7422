"""A local Hugging Face hub with one repository, and programs that use it."""

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
from runs import ROOT


class _Hub(http.server.BaseHTTPRequestHandler):
    """The parts of the hub's interface that uploads and downloads use."""

    files: dict[str, bytes]  # content of the only repository, by name
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self, content: bytes | dict, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        name = self.path.partition("/resolve/main/")[2]
        if name not in self.files:
            self.send_error(404)
            return
        digest = hashlib.sha256(self.files[name]).hexdigest()
        self._answer(self.files[name], ETag=f'"{digest}"', X_Repo_Commit="0" * 40)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/preupload/main"):
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self._answer({"files": files})
            return
        if self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            added = [line["value"] for line in lines if line["key"] == "file"]
            self.files |= {file["path"]: base64.b64decode(file["content"]) for file in added}
        address = f"http://{self.headers['Host']}/user/net"
        self._answer({"url": address, "commitUrl": f"{address}/commit/0", "commitOid": "0" * 40})


@pytest.fixture
def hub():
    """Yield the address and the files of a hub."""
    handler = type("Hub", (_Hub,), {"files": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.files
    server.shutdown()
    server.server_close()


def program(code, address, tmp_path):
    """Run code in a process whose hub is `address`; the library reads the address when it is imported."""
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    code = f"from mit_semseg import Segmenter\nfrom mit_semseg.lib.utils import UserError\n{code}"
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
