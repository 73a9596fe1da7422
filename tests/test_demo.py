"""The web page: what it says of every kind of upload, and what a visitor sees and saves in a real browser."""

import base64
import io
import json
import os
import re
import shutil
import threading
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import here, script
from scenes import write_pairs
from test_segmenter import write_weights

from mit_semseg import Segmenter
from mit_semseg.cli.demo.app import checkpoints_of, examples_of
from mit_semseg.cli.demo.page import WELCOME, Networks, build_page, launch, segment
from mit_semseg.cli.demo.uploads import Limits, called, uploads
from mit_semseg.cli.report import write_report
from mit_semseg.config import load_config
from mit_semseg.dataset import class_table
from mit_semseg.evaluation import SegmentationMetric
from mit_semseg.evaluation.evaluator import Evaluation, Score
from mit_semseg.lib.utils import UserError

NAMES = ["<b>tree</b>", "road & lane", "sky"]  # shown as they are, never as markup
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LIMITS = Limits(upload=1, pixels=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_weights(folder / "run", "resnet18dilated", "c1", "epoch_1.pth", 3)
    write_weights(folder / "run", "resnet18dilated", "c1", "epoch_2.pth", 3, seed=1)
    write_pairs(folder / "data" / "val", [(60, 45)] * 12)
    (folder / "own.yaml").write_text(
        f"DIR: {folder}/run\n"
        f"DATASET: {{root_dataset: {folder}/data, list_val: val, num_class: 3, classes: {json.dumps(NAMES)}, "
        "imgSizes: [40]}\n"
        "MODEL: {arch_encoder: resnet18dilated, arch_decoder: c1}\n"
        "TEST: {checkpoint: epoch_1.pth}\n"
    )
    picture = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(picture).resize((240, 180), Image.BICUBIC).save(folder / "street.png")
    (folder / "page.jpg").write_text("<html>not found</html>")
    Image.new("RGB", (400, 300)).save(folder / "large.png")
    Image.new("RGB", (20, 20)).save(folder / "drawing.png", format="EPS")  # which starts Ghostscript, where it is
    (folder / "heavy.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1_100_000))
    return folder


@pytest.fixture(scope="module")
def cfg(folder):
    return load_config(folder / "own.yaml")


@pytest.fixture(scope="module")
def networks(cfg, folder):
    return Networks(checkpoints_of(cfg), lambda name: Segmenter.from_config(folder / "own.yaml", name, device="cpu"))


def given(path):
    """As the page sends what was uploaded."""
    place = uploads() / str(zlib.crc32(path.read_bytes())) / path.name
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, place)
    return {"path": str(place), "orig_name": path.name}


# What the page does with an upload


def test_what_the_viewer_gets_is_what_the_segmenter_gives(networks, folder):
    steps = []
    value = segment(networks, LIMITS, given(folder / "street.png"), "epoch_2.pth", lambda *step: steps.append(step))
    result = networks["epoch_2.pth"](folder / "street.png")
    labels = zlib.decompress(base64.b64decode(value["labels"]))
    assert np.array_equal(np.frombuffer(labels, np.uint8).reshape(180, 240), result.label_map)
    index = Image.open(io.BytesIO(content_of(value["index"])))
    assert np.array_equal(np.asarray(index), result.label_map)
    about = json.loads(content_of(value["json"]))
    assert about["image"] == "street.png"
    assert [entry["share"] for entry in about["classes"]] == [entry["share"] for entry in result.classes]
    shown = np.asarray(Image.open(io.BytesIO(content_of(value["picture"]))), dtype=int)
    assert abs(shown - result.image).mean() < 4  # a JPEG
    shares = [share for share, _ in steps]
    assert shares == sorted(shares)


def content_of(address):
    return base64.b64decode(address.split("base64,")[1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("page.jpg", "page.jpg: no readable image"),
        ("large.png", r"large.png has 400 x 300 pixels \(0.1 million\); this page takes up to 0.05 million"),
        ("heavy.png", r"heavy.png has 1\.1 MB; this page takes up to 1 MB"),
        ("drawing.png", "drawing.png: no readable image"),
    ],
)
def test_what_is_no_picture_gets_a_sentence(networks, folder, name, message):
    value = segment(networks, LIMITS, given(folder / name), "epoch_1.pth", print)
    assert value["wrong"]
    assert re.match(message, value["message"])
    assert str(folder) not in value["message"]  # nothing of this machine's folders


def test_nothing_but_uploads_is_read(networks, folder, page):
    """Whatever a visitor sends in place of an upload, also past the page."""
    private = str(folder / "street.png")
    gone = given(folder / "street.png")
    Path(gone["path"]).unlink()
    link = uploads() / "link.png"
    link.unlink(missing_ok=True)
    link.symlink_to(private)
    for what in ({"path": private}, {"path": str(link)}, {"url": "x"}, {"path": 3}, [private], private, {"path": "\0"}):
        value = segment(networks, LIMITS, what, "epoch_1.pth", print)
        assert value == {"message": "picture is no upload of this page: choose the picture again", "wrong": True}
    value = segment(networks, LIMITS, gone, "epoch_1.pth", print)
    assert value["message"] == "street.png has been deleted in the meantime: choose the picture again"

    with urllib.request.urlopen(f"{page}config", timeout=30) as answer:
        functions = [function["id"] for function in json.load(answer)["dependencies"]]
    said = "".join(sent(page, {"path": private}, function) for function in functions)
    assert "is no upload of this page" in said
    assert "data:image" not in said


@pytest.mark.parametrize("address", ["http://example.com/a.png", "HTTPS://example.com/a.png"])
def test_nothing_is_fetched_for_a_visitor(address, page):
    """Neither a picture nor anything hidden in another value."""
    file = {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}
    with urllib.request.urlopen(f"{page}config", timeout=30) as answer:
        functions = [entry["id"] for entry in json.load(answer)["dependencies"] if entry["inputs"]]
    assert len(functions) > 1  # the examples' too
    for what in (file, {"deep": [{"down": file}]}):
        for function in functions:
            assert "this page fetches no pictures from elsewhere" in sent(page, what, function)


@pytest.mark.parametrize(
    "route",
    [
        "file=https://example.com/a.png",
        "file=HTTP%3A//example.com/a.png",
        "file=%20https://example.com",
        "proxy=x.hf.space",
        "process_recording",
        "run-history/records",
    ],
)
@pytest.mark.parametrize("prefix", ["gradio_api/", ""])
def test_no_route_fetches_for_a_visitor(page, prefix, route):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{page}{prefix}{route}", timeout=30)
    assert refused.value.code == 403
    assert refused.value.read() == b"this page fetches nothing from elsewhere\n"


def sent(page, what, function):
    """What a server answers to a visitor who does not use the page."""
    visitor = f"visitor{function}"
    body = {"data": [what, "epoch_1.pth"], "fn_index": function, "session_hash": visitor}
    request = urllib.request.Request(
        f"{page}gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=30).close()
    with urllib.request.urlopen(f"{page}gradio_api/queue/data?session_hash={visitor}", timeout=60) as answer:
        return answer.read().decode()


def test_a_network_that_cannot_be_loaded_says_nothing_of_this_machine(folder):
    def broken(name):
        raise UserError(f"{folder}/encoder_{name} is damaged")

    value = segment(Networks(["a"], broken), LIMITS, given(folder / "street.png"), "a", print)
    assert value == {"message": "the network a cannot be loaded now: choose another", "wrong": True}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_picture_that_finds_no_memory_gets_a_sentence(folder, error):
    class Full:
        def __call__(self, picture):
            raise error

    value = segment(Networks(["a"], lambda name: Full()), LIMITS, given(folder / "street.png"), "a", print)
    assert value["wrong"]
    assert "street.png is too large for the memory of this machine" in value["message"]


def test_uploads_have_a_folder_of_their_own(tmp_path, monkeypatch):
    """Also where Gradio has been given one, which other programs may use."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    folder = uploads.__wrapped__()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o077 == 0
    assert os.environ["GRADIO_TEMP_DIR"] == str(folder)


def test_only_the_checkpoints_of_the_list_are_read(networks, folder):
    value = segment(networks, LIMITS, given(folder / "street.png"), "../../secret.pth", print)
    assert value["wrong"]
    assert "there is no checkpoint '../../secret.pth'" in value["message"]


def test_networks_are_loaded_once_and_the_oldest_goes():
    loads = []
    networks = Networks("abcd", lambda name: loads.append(name) or name)
    assert [networks[name] for name in "ababcab"] == list("ababcab")
    assert "".join(loads) == "abcab"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("street.jpg", "street.jpg"),
        ("../../etc/passwd", "passwd"),
        ("C:\\photos\\a.png", "a.png"),
        ("<img src=x onerror=alert(1)>.png", "_img src_x onerror_alert(1)_.png"),
        ("Straße 1.png", "Straße 1.png"),
        ("..", "picture"),
        (None, "picture"),
        ("a" * 500, "a" * 80),
    ],
)
def test_names_are_made_harmless(name, expected):
    assert called(name) == expected


def test_what_there_is_to_choose_from(cfg, folder, tmp_path):
    assert checkpoints_of(cfg) == ["epoch_1.pth", "epoch_2.pth"]
    pictures = examples_of(cfg, None)
    assert len(pictures) == 6
    assert pictures[1].endswith("02.png")  # spread over the twelve
    assert len(examples_of(cfg, str(folder / "data" / "val" / "images"))) == 6
    with pytest.raises(UserError, match=r"--examples .*: no pictures there"):
        examples_of(cfg, str(tmp_path))
    nowhere = load_config(folder / "own.yaml", ["DATASET.root_dataset", str(tmp_path)])
    assert examples_of(nowhere, None) == []
    with pytest.raises(UserError, match=r"the checkpoint can be epoch_1.pth, epoch_2.pth"):
        checkpoints_of(load_config(folder / "own.yaml", ["TEST.checkpoint", "epoch_7.pth"]))


def test_a_taken_port_is_named(page):
    port = int(page.rsplit(":", 1)[1].strip("/"))
    with pytest.raises(UserError, match=f"cannot be served at 127.0.0.1, port {port}: choose another --port"):
        launch(build_page(Networks(["a"], None), LIMITS), LIMITS, port=port)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "99999"], "--port 99999: give a number from 1 to 65535"),
        (["--max-upload", "nan"], "--max-upload nan: give a number from 0.001 up"),
        (["--max-waiting", "0"], "--max-waiting 0: give a number from 1 up"),
    ],
)
def test_limits_that_make_no_sense_are_named(folder, words, message):
    done = here("mit_semseg.demo", "--cfg", folder / "own.yaml", *words)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_script_says_what_is_wrong_before_it_serves(folder):
    done = script("mit_semseg.demo", "--cfg", folder / "own.yaml", "TEST.checkpoint", "epoch_7.pth")
    assert done.returncode == 2
    assert "the checkpoint can be epoch_1.pth, epoch_2.pth" in done.stderr
    assert "Traceback" not in done.stderr


# In a browser


@pytest.fixture(scope="module")
def page(cfg, networks):
    page = build_page(networks, LIMITS, examples_of(cfg, None), "A tiny network.")
    yield launch(page, LIMITS)
    page.close()


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
    """Opens the page as another visitor; nothing may be fetched from elsewhere, nothing may go wrong in its code."""
    contexts, elsewhere, errors = [], [], []

    def visit():
        contexts.append(browser.new_context(accept_downloads=True))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(60_000)
        tab.on("request", lambda r: elsewhere.append(r.url) if r.url.startswith("http") else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(page)
        tab.wait_for_selector("#viewer .message")
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert [url for url in elsewhere if not url.startswith(page)] == []
    assert errors == []


def upload(tab, path):
    tab.set_input_files("#picture input[type=file]", path)


def entries_of(tab):
    tab.wait_for_selector("#viewer .legend li")
    return [row.inner_text().split("\n") for row in tab.query_selector_all("#viewer .legend li")]


def pixels_of(tab):
    """(H, W, 3) of the canvas."""
    address = tab.eval_on_selector("#viewer canvas", "canvas => canvas.toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(content_of(address))).convert("RGB"), dtype=int)


def saved(tab, kind):
    with tab.expect_download() as download:
        tab.click(f"#viewer .{kind}")
    with open(download.value.path(), "rb") as file:
        return download.value.suggested_filename, file.read()


def test_a_visitor_sees_and_saves_the_result(visit, networks, folder):
    tab = visit()
    assert tab.inner_text("#viewer .message") == WELCOME
    upload(tab, folder / "street.png")
    result = networks["epoch_1.pth"](folder / "street.png")
    assert [(name, share) for name, share in entries_of(tab)] == [
        (entry["class"], f"{100 * entry['share']:.1f} %") for entry in result.classes
    ]
    assert tab.inner_text("#viewer .message") == "street.png: 240 x 180 pixels"

    expected = np.asarray(result.overlay(legend=False), dtype=int)
    assert abs(pixels_of(tab) - expected).mean() < 4
    tab.click("#viewer .none")
    assert abs(pixels_of(tab) - result.image).mean() < 4
    tab.click("#viewer .legend li:nth-child(1) input")  # only the largest class
    largest = result.label_map == result.classes[0]["index"]
    tinted = np.where(largest[..., None], expected, result.image)
    assert abs(pixels_of(tab) - tinted).mean() < 4
    tab.click("#viewer .all")
    tab.fill("#viewer .opacity", "100")
    colors = result.table.colors[result.label_map].astype(int)
    assert abs(pixels_of(tab) - colors).max() <= 1

    box = tab.query_selector("#viewer canvas").bounding_box()
    scale = min(box["width"] / 240, box["height"] / 180)
    left, top = box["x"] + (box["width"] - 240 * scale) / 2, box["y"] + (box["height"] - 180 * scale) / 2
    for x, y in ((30, 40), (200, 150), (0, 0), (239, 179)):
        tab.mouse.move(left + (x + 0.5) * scale, top + (y + 0.5) * scale)
        assert tab.inner_text("#viewer .pointed") == NAMES[result.label_map[y, x]]

    name, content = saved(tab, "index")
    assert name == "street_index.png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), result.label_map)
    name, content = saved(tab, "json")
    assert name == "street.json"
    assert json.loads(content)["classes"] == result.classes
    name, content = saved(tab, "as-shown")
    assert name == "street_overlay.png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")), pixels_of(tab))


def test_another_network_and_the_examples(visit, networks, folder):
    tab = visit()
    tab.click("button.gallery-item >> nth=1")
    before = entries_of(tab)
    assert tab.inner_text("#viewer .message") == "02.png: 60 x 45 pixels"
    tab.click("#checkpoint input")
    tab.click("text=epoch_2.pth")
    tab.wait_for_function(
        "before => document.querySelector('#viewer .legend').innerText.replaceAll(/\\s+/g, ' ') != before",
        arg=" ".join(" ".join(row) for row in before),
    )
    result = networks["epoch_2.pth"](folder / "data" / "val" / "images" / "02.png")
    assert [name for name, _ in entries_of(tab)] == [entry["class"] for entry in result.classes]


def test_a_wrong_file_gets_a_sentence_and_the_page_goes_on(visit, folder):
    tab = visit()
    upload(tab, folder / "large.png")
    tab.wait_for_selector("#viewer .message.wrong")
    assert "large.png has 400 x 300 pixels" in tab.inner_text("#viewer .message")
    assert not tab.is_visible("#viewer canvas")
    tab.click("button[aria-label='Remove Image']")
    upload(tab, folder / "page.jpg")
    tab.wait_for_selector("text=page.jpg: no readable image")
    assert not any(image.is_visible() for image in tab.query_selector_all("#picture img"))  # a broken one
    tab.click("button[aria-label='Remove Image']")
    tab.wait_for_selector("text=Choose, drop, paste")
    upload(tab, folder / "heavy.png")
    tab.wait_for_selector("text=/exceeds|too large|maximum/i")
    tab.reload()
    upload(tab, folder / "street.png")
    assert len(entries_of(tab)) >= 2


@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_at_any_width(visit, folder, width):
    """The empty place says what will be there; the buttons stand in one row, and nothing is wider than the page."""
    tab = visit()
    tab.set_viewport_size({"width": width, "height": 900})
    assert tab.query_selector("#viewer .message.empty").bounding_box()["height"] > 200
    upload(tab, folder / "street.png")
    entries_of(tab)
    buttons = [button.bounding_box() for button in tab.query_selector_all("#viewer .buttons > *")]
    assert len(buttons) == 5
    assert len({round(box["y"]) for box in buttons}) == 1
    assert max(box["x"] + box["width"] for box in buttons) <= width
    assert not tab.query_selector("#viewer .message.empty")


@pytest.mark.parametrize("width", [1100, 400])
def test_the_report_at_any_width(browser, tmp_path, width):
    names = ("a name of some length; with synonyms", "road, route", "sky")
    metric = SegmentationMetric(3)
    metric.confusion += np.array([[9, 1, 0], [6, 20, 4], [0, 2, 1]])
    scores = [Score(f"a/folder/with/a_long_name_of_a_picture_{i}.jpg", 0.5, 0.5) for i in range(3)]
    Image.new("RGB", (972, 240), "teal").save(tmp_path / "panel.png")
    panels = {score.name: "panel.png" for score in scores}
    write_report(Evaluation(metric, 3, 1.0, class_table(names, 3), scores), tmp_path, "resnet + ppm, ckpt/a", panels)
    tab = browser.new_page(viewport={"width": width, "height": 900})
    tab.goto((tmp_path / "report.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    columns = [column.bounding_box() for column in tab.query_selector_all(".panel >> nth=0 >> .columns span")]
    picture = tab.query_selector(".panel img").bounding_box()
    for number, column in enumerate(columns):
        middle = column["x"] + column["width"] / 2 - picture["x"]
        assert middle / picture["width"] == pytest.approx((2 * number + 1) / 6, abs=0.02)
    tab.close()


def test_two_visitors_at_once(visit, networks, folder, monkeypatch):
    """The second waits, sees its place, and each gets what is theirs."""
    first, second, going = visit(), visit(), threading.Event()
    load = networks.__class__.__getitem__
    monkeypatch.setattr(Networks, "__getitem__", lambda self, name: going.wait(60) and load(self, name))
    upload(first, folder / "street.png")
    first.wait_for_selector("text=loading the network")
    upload(second, folder / "data" / "val" / "images" / "00.png")
    second.wait_for_selector("text=/queue: *\\d+\\/\\d+/")
    going.set()
    entries_of(first)
    entries_of(second)
    assert first.inner_text("#viewer .message") == "street.png: 240 x 180 pixels"
    assert second.inner_text("#viewer .message") == "00.png: 60 x 45 pixels"
