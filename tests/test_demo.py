"""The web page limits uploads, reads no other files and no URLs, and shows results in Chromium."""

import base64
import io
import json
import os
import shutil
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from runs import here
from scenes import write_pairs
from test_segmenter import write_weights

from mit_semseg import Segmenter
from mit_semseg.cli.demo.app import find_checkpoints, find_examples
from mit_semseg.cli.demo.page import WELCOME, Networks, build_page, launch, segment
from mit_semseg.cli.demo.uploads import Limits, read_upload, safe_name, upload_folder
from mit_semseg.config import load_config
from mit_semseg.lib.utils import UserError

pytest.importorskip("gradio")

NAMES = ["<b>tree</b>", "road & lane", "sky"]  # the page must not parse names as HTML
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LIMITS = Limits(upload=1, pixels=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    for epoch in (1, 2):
        write_weights(folder / "run", "resnet18dilated", "c1", f"epoch_{epoch}.pth", 3, seed=epoch - 1)
    write_pairs(folder / "data" / "val", [(60, 45)] * 12)
    (folder / "own.yaml").write_text(
        f"DIR: {folder}/run\n"
        f"DATASET: {{root_dataset: {folder}/data, list_val: val, num_class: 3, classes: {json.dumps(NAMES)}, "
        "imgSizes: [40]}\n"
        "MODEL: {arch_encoder: resnet18dilated, arch_decoder: c1}\n"
        "TEST: {checkpoint: epoch_1.pth}\n"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((240, 180), Image.BICUBIC).save(folder / "street.png")
    (folder / "page.jpg").write_text("<html>not found</html>")
    Image.new("RGB", (400, 300)).save(folder / "large.png")
    Image.new("RGB", (20, 20)).save(folder / "drawing.png", format="EPS")  # Pillow would read EPS with Ghostscript
    (folder / "heavy.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1_100_000))
    return folder


@pytest.fixture(scope="module")
def cfg(folder):
    return load_config(folder / "own.yaml")


@pytest.fixture(scope="module")
def networks(cfg, folder):
    return Networks(find_checkpoints(cfg), lambda name: Segmenter.from_config(folder / "own.yaml", name, device="cpu"))


@pytest.fixture(scope="module")
def page(cfg, networks):
    page = build_page(networks, LIMITS, find_examples(cfg, None), "A tiny network.")
    yield launch(page, LIMITS)
    page.close()


def as_upload(path):
    """Copy a file to the upload folder; return the value that refers to this upload in a request."""
    return {"path": str(shutil.copy(path, upload_folder())), "orig_name": path.name}


def decode_image(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split("base64,")[1]))), dtype=int)


def ignore(*_):
    pass


def test_viewer_gets_the_result_of_the_segmenter(networks, folder):
    value = segment(networks, LIMITS, as_upload(folder / "street.png"), "epoch_2.pth", ignore)
    result = networks["epoch_2.pth"](folder / "street.png")
    labels = zlib.decompress(base64.b64decode(value["labels"]))
    assert np.array_equal(np.frombuffer(labels, np.uint8).reshape(180, 240), result.label_map)
    assert np.array_equal(decode_image(value["index"]), result.label_map)
    assert json.loads(base64.b64decode(value["json"].split("base64,")[1]))["classes"] == result.classes
    image = decode_image(value["image"])
    assert abs(image - result.image).mean() < 4  # the viewer gets the image as JPEG


@pytest.mark.parametrize("name", ["page.jpg", "large.png", "heavy.png", "drawing.png"])
def test_unusable_upload_gets_a_message_without_server_paths(networks, folder, name):
    value = segment(networks, LIMITS, as_upload(folder / name), "epoch_1.pth", ignore)
    assert value["failed"]
    assert name in value["message"]
    assert str(folder) not in value["message"]
    assert str(upload_folder()) not in value["message"]


def send(page, value, function):
    """Send a request without a browser; return the response of the server."""
    session = f"visitor{function}"
    body = {"data": [value, "epoch_1.pth"], "fn_index": function, "session_hash": session}
    request = urllib.request.Request(
        f"{page}gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=30).close()
    with urllib.request.urlopen(f"{page}gradio_api/queue/data?session_hash={session}", timeout=60) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def functions(page):
    with urllib.request.urlopen(f"{page}config", timeout=30) as answer:
        return [function["id"] for function in json.load(answer)["dependencies"] if function["inputs"]]


def test_only_uploads_are_read(networks, folder, page, functions):
    private = str(folder / "street.png")
    link = upload_folder() / "link.png"
    link.unlink(missing_ok=True)
    link.symlink_to(private)
    for value in ({"path": private}, {"path": str(link)}, {"path": 3}, [private], private, {"path": "\0"}):
        answer = segment(networks, LIMITS, value, "epoch_1.pth", ignore)
        assert (answer.keys(), answer["failed"]) == ({"message", "failed"}, True)
    answers = "".join(send(page, {"path": private}, function) for function in functions)
    assert "was not uploaded" in answers
    assert "data:image" not in answers


def test_urls_in_requests_are_refused(page, functions):
    files = [
        {"path": f"{kind}://example.com/a.png", "meta": {"_type": "gradio.FileData"}} for kind in ("http", "HTTPS")
    ]
    assert len(functions) > 1  # one of them is for the examples
    for value in (*files, {"nested": [{"value": files[0]}]}):
        for function in functions:
            assert "this page does not fetch URLs" in send(page, value, function)


@pytest.mark.parametrize(
    "route", ["file=https://x.com/a", "file=HTTP%3A//x.com", "file=%20https://x.com", "proxy=x", "process_recording"]
)
@pytest.mark.parametrize("prefix", ["gradio_api/", ""])
def test_routes_that_fetch_urls_are_refused(page, prefix, route):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{page}{prefix}{route}", timeout=30)
    assert refused.value.code == 403


@pytest.mark.parametrize(
    ("checkpoint", "error", "message"),
    [
        ("../../secret.pth", None, "../../secret.pth"),
        ("a", UserError("/server/path/encoder_a is damaged"), "network a"),
        ("a", MemoryError(), "out of memory"),
    ],
)
def test_failure_gets_a_message_without_server_paths(folder, checkpoint, error, message):
    networks = Networks(["a"], mock.Mock(side_effect=error))
    value = segment(networks, LIMITS, as_upload(folder / "street.png"), checkpoint, ignore)
    assert value["failed"]
    assert message in value["message"]
    assert "/server/path" not in value["message"]


def test_changed_checkpoint_is_loaded_again():
    versions = iter([1, 1, 2])
    networks = Networks(["a"], mock.Mock(side_effect=lambda name: object()), lambda name: next(versions))
    first, second, third = (networks["a"] for _ in range(3))
    assert first is second
    assert third is not first


def test_image_that_is_too_long_for_the_page_is_refused(folder):
    Image.new("RGB", (70_000, 1)).save(folder / "long.png")
    with pytest.raises(UserError, match="long"):
        read_upload(as_upload(folder / "long.png"), "long.png", Limits(pixels=1))


def test_upload_folder_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    folder = upload_folder.__wrapped__()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o077 == 0
    assert os.environ["GRADIO_TEMP_DIR"] == str(folder)


def test_upload_names_are_made_safe():
    for name, expected in {
        "Straße 1.png": "Straße 1.png",
        "../../etc/passwd": "passwd",
        "C:\\photos\\a.png": "a.png",
        "<img src=x onerror=alert(1)>.png": "_img src_x onerror_alert(1)_.png",
        "..": "image",
        None: "image",
        "a" * 500: "a" * 80,
    }.items():
        assert safe_name(name) == expected


def test_checkpoints_and_examples_are_listed(cfg, folder, tmp_path):
    assert find_checkpoints(cfg) == ["epoch_1.pth", "epoch_2.pth"]
    assert [Path(path).name for path in find_examples(cfg, None)] == [f"{i:02d}.png" for i in range(0, 12, 2)]
    assert len(find_examples(cfg, str(folder / "data" / "val" / "images"))) == 6
    with pytest.raises(UserError, match="--examples"):
        find_examples(cfg, str(tmp_path))
    assert find_examples(load_config(folder / "own.yaml", ["DATASET.root_dataset", str(tmp_path)]), None) == []


def test_used_port_is_named(page):
    port = int(page.rsplit(":", 1)[1].strip("/"))
    with pytest.raises(UserError, match=f"port {port}.* --port"):
        launch(build_page(Networks(["a"], str), LIMITS), LIMITS, port=port)


@pytest.mark.parametrize("words", ["--port 99999", "--max-upload nan", "--max-waiting 0"])
def test_invalid_options_are_reported_before_serving(folder, words):
    assert words in here("mit_semseg.demo", "--cfg", folder / "own.yaml", *words.split(), code=2).stderr


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, page):
    """Return a function that opens the page. Requests to other hosts and JavaScript errors fail the test."""
    contexts, urls, errors = [], [], []

    def visit():
        contexts.append(browser.new_context(accept_downloads=True))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(60_000)
        tab.on("request", lambda request: urls.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(page)
        tab.wait_for_selector("#viewer .message")
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert [url for url in urls if url.startswith("http") and not url.startswith(page)] == []
    assert errors == []


def upload(tab, path):
    tab.set_input_files("#image input[type=file]", path)


def legend(tab):
    tab.wait_for_selector("#viewer .legend li")
    return [row.inner_text().split("\n") for row in tab.query_selector_all("#viewer .legend li")]


def canvas_pixels(tab):
    """Return the pixels (H, W, 3) that the viewer shows."""
    return decode_image(tab.eval_on_selector("#viewer canvas", "canvas => canvas.toDataURL('image/png')"))[..., :3]


def download(tab, kind, name):
    with tab.expect_download() as download:
        tab.click(f"#viewer .{kind}")
    assert download.value.suggested_filename == name
    return Path(download.value.path())


def test_viewer_shows_and_saves_the_result(visit, networks, folder):
    tab = visit()
    assert tab.inner_text("#viewer .message") == WELCOME
    upload(tab, folder / "street.png")
    result = networks["epoch_1.pth"](folder / "street.png")
    assert legend(tab) == [[entry["class"], f"{100 * entry['fraction']:.1f} %"] for entry in result.classes]
    assert tab.inner_text("#viewer .message") == "street.png: 240 x 180 pixels"

    overlay = np.asarray(result.overlay(legend=False), dtype=int)
    assert abs(canvas_pixels(tab) - overlay).mean() < 4
    tab.click("#viewer .none")
    assert abs(canvas_pixels(tab) - result.image).mean() < 4
    tab.click("#viewer .legend li:nth-child(1) input")  # show only the largest class
    largest = result.label_map == result.classes[0]["index"]
    assert abs(canvas_pixels(tab) - np.where(largest[..., None], overlay, result.image)).mean() < 4
    tab.click("#viewer .all")
    tab.fill("#viewer .opacity", "100")
    assert abs(canvas_pixels(tab) - result.table.colors[result.label_map].astype(int)).max() <= 1

    box = tab.query_selector("#viewer canvas").bounding_box()
    scale = min(box["width"] / 240, box["height"] / 180)
    left, top = box["x"] + (box["width"] - 240 * scale) / 2, box["y"] + (box["height"] - 180 * scale) / 2
    for x, y in ((30, 40), (200, 150), (0, 0), (239, 179)):
        tab.mouse.move(left + (x + 0.5) * scale, top + (y + 0.5) * scale)
        assert tab.inner_text("#viewer .tooltip") == NAMES[result.label_map[y, x]]

    assert np.array_equal(np.asarray(Image.open(download(tab, "index", "street_index.png"))), result.label_map)
    assert json.loads(download(tab, "json", "street.json").read_bytes())["classes"] == result.classes
    overlay = Image.open(download(tab, "overlay", "street_overlay.png")).convert("RGB")
    assert np.array_equal(np.asarray(overlay), canvas_pixels(tab))


def test_example_and_network_can_be_chosen(visit, networks, folder):
    tab = visit()
    tab.click("button.gallery-item >> nth=1")
    legend(tab)
    assert tab.inner_text("#viewer .message") == "02.png: 60 x 45 pixels"
    tab.click("#checkpoint input")
    tab.click("text=epoch_2.pth")
    result = networks["epoch_2.pth"](folder / "data" / "val" / "images" / "02.png")
    tab.wait_for_selector(f"#viewer .legend >> text='{100 * result.classes[0]['fraction']:.1f} %'")
