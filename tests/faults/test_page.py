"""The web page among visitors who mean no good: it stays up, within its memory, and gives nobody what is another's."""

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

import numpy as np
import pytest
from PIL import Image
from runs import Job
from test_segmenter import write_weights

pytest.importorskip("gradio")

LIMIT = 1_000_000  # bytes of an upload
TOO_MANY = "full"  # what a visitor is told that finds no place in the queue


class Server:
    """The page in a process of its own.

    Attributes:
        port: it is served at.
        function: number by which Gradio knows what segments a picture.
    """

    def __init__(self, folder):
        write_weights(folder / "run", "resnet18dilated", "c1", "epoch_1.pth", 3)
        options = ["DIR", folder / "run", "DATASET.num_class", 3, "DATASET.imgSizes", "(40,)"]
        options += [
            "MODEL.arch_encoder",
            "resnet18dilated",
            "MODEL.arch_decoder",
            "c1",
            "TEST.checkpoint",
            "epoch_1.pth",
        ]
        limits = ["--max-upload", LIMIT / 1e6, "--max-pixels", 0.05]
        self.job = Job("mit_semseg.demo", "--gpu", "cpu", "--port", 0, *limits, *options)
        line = next(line for line in self.job.lines() if "http://" in line)
        self.port = int(re.search(r"http://127\.0\.0\.1:(\d+)", line)[1])
        functions = json.loads(self.get("/config")[1])["dependencies"]
        self.function = next(entry["id"] for entry in functions if len(entry["inputs"]) == 2)

    def request(self, path: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, bytes]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", body, {"Content-Type": kind} if body else {}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def get(self, path: str) -> tuple[int, bytes]:
        return self.request(path)

    def upload(self, name: str, content: bytes) -> tuple[int, bytes]:
        mark = b"----boundary"
        head = f'Content-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
        body = b"--" + mark + b"\r\n" + head.encode() + content + b"\r\n--" + mark + b"--\r\n"
        return self.request("/gradio_api/upload", body, f"multipart/form-data; boundary={mark.decode()}")

    def segmented(self, visitor: str, given, function: int | None = None) -> str:
        """All that a visitor is told about a picture, or why there is nothing."""
        body = {"data": [given, "epoch_1.pth"], "session_hash": visitor}
        body["fn_index"] = self.function if function is None else function
        code, answer = self.request("/gradio_api/queue/join", json.dumps(body).encode())
        if code != 200:
            return answer.decode(errors="replace")
        return self.get(f"/gradio_api/queue/data?session_hash={visitor}")[1].decode(errors="replace")

    def visit(self, number: int) -> tuple[int, str]:
        """A visitor with a picture of its own size; what there is to see."""
        file = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50 + number, 3), np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        code, answer = self.upload(f"picture{number}.png", file.getvalue())
        if code != 200:
            return number, answer.decode()
        given = {
            "path": json.loads(answer)[0],
            "orig_name": f"picture{number}.png",
            "meta": {"_type": "gradio.FileData"},
        }
        return number, self.segmented(f"visitor{number}", given)

    def resident(self) -> float:
        """MiB in memory."""
        return int(Path(f"/proc/{self.job.pid}/statm").read_text().split()[1]) * 4096 / 2**20

    def is_well(self) -> bool:
        """Whether an honest visitor gets a picture."""
        number = random.randrange(200, 400)
        return f"picture{number}.png: {50 + number} x 40 pixels" in self.visit(number)[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("page"))
    assert server.is_well()
    yield server
    server.job.kill()
    server.job.end(10)


def test_a_hundred_visitors_at_once_get_what_is_theirs(server):
    """Or a word that there are too many."""
    before = server.resident()
    with ThreadPoolExecutor(100) as visitors:
        told = list(visitors.map(server.visit, range(100)))
    served = 0
    for number, text in told:
        names = set(re.findall(r"picture(\d+)\.png: (\d+) x 40 pixels", text))
        if names:
            assert names == {(str(number), str(50 + number))}
            served += 1
        else:
            assert TOO_MANY in text, text[:300]
    assert served >= 20
    print(f"{served} of 100 served, {server.resident() - before:.0f} MiB more")
    assert server.resident() - before < 500
    assert server.is_well()


def test_slow_uploads_keep_nobody_waiting(server):
    slow = []
    for _ in range(50):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: {LIMIT}\r\n"
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n".encode())
        slow.append(connection)
    began = time.perf_counter()
    assert server.is_well()
    assert time.perf_counter() - began < 20
    for connection in slow:
        connection.close()


def test_what_is_too_large_is_not_kept(server):
    before = server.resident()
    for _ in range(3):
        try:
            code, _ = server.upload("large.png", bytes(40 * LIMIT))
        except (urllib.error.URLError, ConnectionError, http.client.HTTPException):
            code = 413  # it has hung up
        assert code >= 400
    assert server.resident() - before < 200
    assert server.is_well()


def test_anything_but_the_protocol(server):
    """Bytes that are no requests, requests that are none of Gradio's, values of other types."""
    rng = random.Random(0)
    for number in range(60):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            start = rng.choice(
                [b"", b"GET / HTTP/1.1\r\n", b"POST /gradio_api/queue/join HTTP/1.1\r\nContent-Length: 9\r\n\r\n"]
            )
            connection.sendall(start + rng.randbytes(rng.randrange(1, 2000)))
        if number % 4 == 0:
            path = rng.choice(
                ["upload", "queue/join", "queue/data", "run/predict", "call/work", "file=", "proxy=x", "reset"]
            )
            code, _ = server.request(
                f"/gradio_api/{path}", rng.choice([b"{}", b"[]", b"null", rng.randbytes(40), b'{"data": 3}'])
            )
            assert code >= 300
    paths = (
        None,
        3,
        [],
        "x",
        {"path": None},
        {"path": [1]},
        {"path": "x" * 10_000},
        {"path": "\0"},
        {"path": "/etc/passwd"},
    )
    for number, given in enumerate(paths):
        said = server.segmented(f"odd{number}", given)
        assert "data:image" not in said
        assert "root:" not in said
    assert server.is_well()


def test_no_other_file_is_served(server):
    for path in ("/etc/passwd", "../../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/proc/self/environ", "%00"):
        for route in ("/gradio_api/file=", "/file=", "/static/", "/assets/", "/gradio_api/file/"):
            code, answer = server.get(f"{route}{path}")
            assert code >= 300
            assert b"root:" not in answer
            assert b"PATH=" not in answer
    assert server.is_well()


def test_it_ends_when_it_is_told_to(server):
    """Also with visitors connected."""
    waiting = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(5)]
    threading.Timer(1, server.job.send, (15,)).start()
    done = server.job.end(30)
    for connection in waiting:
        connection.close()
    assert done.returncode == 143
