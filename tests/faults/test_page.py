"""A public web page stays available, limits its memory, and gives visitors no access to server files."""

import http.client
import io
import json
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from runs import Job
from test_segmenter import write_weights

pytest.importorskip("gradio")

LIMIT = 1_000_000  # largest upload in bytes


class Server:
    """Runs the web page in a new process."""

    def __init__(self, folder):
        write_weights(folder / "run", "resnet18dilated", "c1", "epoch_1.pth", 3)
        options = f"DIR {folder}/run DATASET.num_class 3 DATASET.imgSizes (40,) TEST.checkpoint epoch_1.pth".split()
        options += ["MODEL.arch_encoder", "resnet18dilated", "MODEL.arch_decoder", "c1"]
        limits = ["--max-upload", LIMIT / 1e6, "--max-pixels", 0.05]
        self.job = Job("mit_semseg.demo", "--gpu", "cpu", "--port", 0, *limits, *options)
        line = next(line for line in self.job.lines() if "http://" in line)
        self.port = int(re.search(r"http://127\.0\.0\.1:(\d+)", line)[1])
        functions = json.loads(self.request("/config")[1])["dependencies"]
        self.function = next(entry["id"] for entry in functions if len(entry["inputs"]) == 2)

    def request(self, path: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, bytes]:
        """Send a GET request, or a POST request if there is a body; return the status code and the response."""
        url, headers = f"http://127.0.0.1:{self.port}{path}", {"Content-Type": kind} if body else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def upload(self, name: str, content: bytes) -> tuple[int, bytes]:
        head = f'Content-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
        body = b"--b\r\n" + head.encode() + content + b"\r\n--b--\r\n"
        return self.request("/gradio_api/upload", body, "multipart/form-data; boundary=b")

    def segment(self, visitor: str, file) -> str:
        """Request a segmentation; return all messages of the server, or its error response."""
        body = {"data": [file, "epoch_1.pth"], "session_hash": visitor, "fn_index": self.function}
        code, answer = self.request("/gradio_api/queue/join", json.dumps(body).encode())
        if code == 200:
            answer = self.request(f"/gradio_api/queue/data?session_hash={visitor}")[1]
        return answer.decode(errors="replace")

    def visit(self, number: int) -> str:
        """Upload and segment an image that is 50 + `number` pixels wide; return the server's messages or error."""
        file, name = io.BytesIO(), f"image{number}.png"
        Image.new("RGB", (50 + number, 40)).save(file, "PNG")
        code, answer = self.upload(name, file.getvalue())
        if code != 200:
            return answer.decode()
        value = {"path": json.loads(answer)[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        return self.segment(f"visitor{number}", value)

    def memory(self) -> float:
        """Return the resident memory of the server in MiB."""
        return int(Path(f"/proc/{self.job.pid}/statm").read_text().split()[1]) * 4096 / 2**20

    def check(self) -> None:
        number = random.randrange(200, 400)
        assert f"image{number}.png: {50 + number} x 40 pixels" in self.visit(number)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("page"))
    server.check()
    yield server
    server.job.kill()


def test_100_visitors_get_their_own_result_or_a_full_queue(server):
    before, served = server.memory(), 0
    with ThreadPoolExecutor(100) as visitors:
        answers = list(visitors.map(server.visit, range(100)))
    for number, answer in enumerate(answers):
        results = set(re.findall(r"image(\d+)\.png: (\d+) x 40 pixels", answer))
        assert results in ({(str(number), str(50 + number))}, set())
        assert results or "full" in answer, answer[:300]
        served += len(results)
    assert served >= 20
    assert server.memory() - before < 500
    server.check()


def test_slow_uploads_do_not_block_the_server(server):
    connections = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(50)]
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: {LIMIT}\r\n"
    for connection in connections:
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n".encode())
    start = time.perf_counter()
    server.check()
    assert time.perf_counter() - start < 20
    for connection in connections:
        connection.close()


def test_large_uploads_are_refused_without_using_memory(server):
    before = server.memory()
    for _ in range(3):
        try:
            code, _ = server.upload("large.png", bytes(40 * LIMIT))
        except (urllib.error.URLError, ConnectionError, http.client.HTTPException):
            code = 413  # the server may refuse by closing the connection
        assert code >= 400
    assert server.memory() - before < 200
    server.check()


def test_server_survives_invalid_requests(server):
    """Send random bytes, invalid request bodies, and values that are not uploads."""
    rng = random.Random(0)
    starts = b"", b"GET / HTTP/1.1\r\n", b"POST /gradio_api/queue/join HTTP/1.1\r\nContent-Length: 9\r\n\r\n"
    routes = "upload", "queue/join", "queue/data", "run/predict", "call/work", "file=", "proxy=x", "reset"
    for number in range(60):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(rng.choice(starts) + rng.randbytes(rng.randrange(1, 2000)))
        if number % 4 == 0:
            body = rng.choice([b"{}", b"[]", b"null", rng.randbytes(40), b'{"data": 3}'])
            assert server.request(f"/gradio_api/{rng.choice(routes)}", body)[0] >= 300
    values = None, 3, [], "x", *({"path": path} for path in (None, [1], "x" * 10_000, "\0", "/etc/passwd"))
    for number, value in enumerate(values):
        assert "data:image" not in server.segment(f"invalid{number}", value)
    server.check()


def test_other_files_are_not_served(server):
    for path in ("/etc/passwd", "../../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/proc/self/environ", "%00"):
        for route in ("/gradio_api/file=", "/file=", "/static/", "/assets/", "/gradio_api/file/"):
            assert server.request(f"{route}{path}")[0] >= 300
    server.check()


def test_sigterm_stops_the_server_with_open_connections(server):
    connections = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(5)]
    threading.Timer(1, server.job.send, (15,)).start()
    done = server.job.end(30, code=None)
    for connection in connections:
        connection.close()
    assert done.returncode == 143
