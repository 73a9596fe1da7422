"""A web page that segments pictures with a trained network.

    python -m mit_semseg.demo --cfg config/NAME.yaml [--port 7860] [KEY VALUE ...]

The page is for this computer only unless --host says otherwise. Nothing of a picture is kept: what is shown and saved
is made in the visitor's browser, and uploads are deleted after ten minutes.
"""

import base64
import io
import json
import logging
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

from ..config import Config, load_config
from ..dataset.datasets import ValDataset
from ..dataset.files import image_size, read_image
from ..dataset.layouts import find_images
from ..engine import RunFiles
from ..lib.utils import UserError
from .cli import make_parser, run, setup_logger
from .devices import describe, pick_devices
from .predictor import Segmenter
from .results import Result

logger = logging.getLogger(__name__)

EXAMPLES = """\
  python -m mit_semseg.demo --cfg config/quickstart.yaml
  python -m mit_semseg.demo --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml --gpu 0 TEST.checkpoint best.pth
  python -m mit_semseg.demo --cfg config/quickstart.yaml --host 0.0.0.0 --port 8000 --max-upload 5 --max-pixels 8"""

PAGE = Path(__file__).parent / "page"
TITLE = "Scene parsing"
WELCOME = "Choose, drop, paste or photograph a picture."
LONGEST_NAME = 80  # characters of a picture's name that are kept
QUALITY = 92  # of the JPEG that travels to the browser
KEPT_NETWORKS = 2  # in memory
KEPT_SESSIONS = 32  # visitors whose last result Gradio holds in memory, to show it again after a lost connection
UPLOADS_CHECKED, UPLOADS_KEPT = 120, 600  # seconds
SHOWN_EXAMPLES = 6


@dataclass(frozen=True)
class Limits:
    """What visitors may ask for.

    Attributes:
        upload: megabytes (10^6 bytes) of a file.
        pixels: of a picture, in millions.
        waiting: pictures in the queue; more are turned away with a sentence.
    """

    upload: float = 20
    pixels: float = 25
    waiting: int = 20


class Networks:
    """Segmenters by checkpoint, loaded when they are asked for; the last few stay in memory.

    Args:
        names: of the checkpoints that may be asked for.
        load: gives the segmenter of one.
    """

    def __init__(self, names: Sequence[str], load: Callable[[str], Segmenter]):
        self.names, self._load, self._loaded = tuple(names), load, OrderedDict()

    def __getitem__(self, name: str) -> Segmenter:
        if name not in self.names:
            raise UserError(f"there is no checkpoint {str(name)[:LONGEST_NAME]!r}: choose one of the list")
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        self._loaded.move_to_end(name)
        while len(self._loaded) > KEPT_NETWORKS:
            self._loaded.popitem(last=False)
        return self._loaded[name]


def checkpoints_of(cfg: Config) -> list[str]:
    """Checkpoints one can choose from: TEST.checkpoint first, then the best and the epochs of DIR, newest first."""
    files = RunFiles(cfg.DIR)
    found = [cfg.TEST.checkpoint, "best.pth", *(f"epoch_{n}.pth" for n in reversed(files.epochs()))]
    there = [name for name in dict.fromkeys(found) if files.part("encoder", name).is_file()]
    if not there or there[0] != cfg.TEST.checkpoint:
        files.pair(cfg.TEST.checkpoint)  # a file elsewhere; otherwise this says what is missing
        there.insert(0, cfg.TEST.checkpoint)
    return there


def examples_of(cfg: Config, given: str | None) -> list[str]:
    """Pictures shown as examples: of a folder, or some of the validation set if it is there."""
    if given:
        found = [str(path) for path in find_images(Path(given))]
        if not found:
            raise UserError(f"--examples {given}: no pictures there")
        return found[:SHOWN_EXAMPLES]
    try:
        data = ValDataset(cfg.DATASET.root_dataset, cfg.DATASET.list_val, cfg.DATASET)
    except UserError as error:
        logger.info("no examples: %s", error)
        return []
    records = data.records[:: max(1, len(data.records) // SHOWN_EXAMPLES)]  # neighbours are often alike
    return [str(Path(cfg.DATASET.root_dataset, record["fpath_img"])) for record in records[:SHOWN_EXAMPLES]]


def called(name) -> str:
    """A name fit to be shown and to be that of a file, of whatever a visitor's browser says the picture is called."""
    last = PurePosixPath(str(name or "").replace("\\", "/")).name
    return re.sub(r"[^\w. ()-]", "_", last)[:LONGEST_NAME].lstrip(".") or "picture"


def read_upload(path: str, name: str, pixels: float) -> Image.Image:
    """A picture that came from a visitor.

    Args:
        path: of the file.
        name: that messages call it.
        pixels: it may have, in millions.

    Raises:
        UserError: no picture, or too many pixels.
    """
    try:
        width, height = image_size(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from None
    if width * height > pixels * 1e6:
        raise UserError(
            f"{name} has {width} x {height} pixels ({width * height / 1e6:.1f} million); this page takes up to "
            f"{pixels:g} million: make it smaller"
        )
    return read_image(path, name)


def shown(result: Result) -> dict:
    """What the page's viewer (page/viewer.js) shows of a result, in plain values."""
    height, width = result.label_map.shape
    wide = len(result.table) > 256
    file, index = io.BytesIO(), io.BytesIO()
    Image.fromarray(result.image).save(file, "JPEG", quality=QUALITY, subsampling=0)
    result.picture("_index.png").save(index, "PNG")
    labels = result.label_map.astype("<u2" if wide else np.uint8).tobytes()
    names = result.table.labels
    return {
        "message": f"{result.path}: {width} x {height} pixels",
        "name": Path(result.path).stem,
        "width": width,
        "height": height,
        "wide": wide,
        "labels": base64.b64encode(zlib.compress(labels, 1)).decode(),
        "picture": _address("image/jpeg", file.getvalue()),
        "index": _address("image/png", index.getvalue()),
        "json": _address("application/json", json.dumps(result.as_dict(), indent=1, ensure_ascii=False).encode()),
        "classes": [{**entry, "class": names[entry["index"]]} for entry in result.classes],
    }


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def segment(networks: Networks, limits: Limits, given: dict | None, checkpoint: str, step: Callable) -> dict:
    """What the viewer shows of a picture that a visitor has given, or why there is nothing to show.

    Args:
        networks: to choose from.
        limits: of the picture.
        given: `path` of the upload and `orig_name`, as the page sends them; None is no picture.
        checkpoint: of the networks.
        step: called with (share of the work done, what is done now).
    """
    if given is None:
        return {"message": WELCOME}
    name = called(given.get("orig_name"))
    try:
        step(0.05, "reading the picture")
        picture = read_upload(given["path"], name, limits.pixels)
        step(0.15, "loading the network")
        segmenter = networks[checkpoint]
        step(0.35, "segmenting")
        result = replace(segmenter(picture), path=name)
        step(0.9, "sending the result")
        return shown(result)
    except UserError as error:
        return {"message": str(error), "wrong": True}
    except torch.OutOfMemoryError:
        logger.exception("out of memory")
        return {"message": f"{name} is too large for the memory of this machine: make it smaller", "wrong": True}


def build_page(networks: Networks, limits: Limits, examples: Sequence[str] = (), about: str = ""):
    """The page, as Gradio's `Blocks`; to be started by `launch`.

    Args:
        networks: that visitors can choose from.
        limits: of pictures and of the queue.
        examples: paths of pictures.
        about: a line on top.

    Raises:
        UserError: Gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError:
        raise UserError('Gradio is not installed: pip install -e ".[demo]"') from None

    def work(given, checkpoint, progress=gr.Progress()):  # noqa: B008  (how Gradio hands it over)
        return segment(networks, limits, given, checkpoint, lambda share, text: progress(share, desc=text))

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(UPLOADS_CHECKED, UPLOADS_KEPT)) as page:
        gr.Markdown(f"# {TITLE}\n{about} Pictures of up to {limits.upload:g} MB and {limits.pixels:g} million pixels.")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                picture = gr.Image(
                    type="filepath", sources=["upload", "clipboard", "webcam"], label="Picture", elem_id="picture"
                )
                checkpoint = gr.Dropdown(
                    list(networks.names), value=networks.names[0], label="Network", elem_id="checkpoint"
                )
                if examples:
                    gr.Examples(list(examples), picture, label="Examples")
            with gr.Column(scale=5, min_width=320):
                viewer = gr.HTML(
                    {"message": WELCOME},
                    html_template=_part("viewer.html"),
                    css_template=_part("viewer.css"),
                    js_on_load=_part("viewer.js"),
                    elem_id="viewer",
                )
        # The picture is read here, within the limits and with a sentence for what is none, and not by Gradio.
        given = {"inputs": [picture, checkpoint], "outputs": viewer, "preprocess": False, "show_progress_on": viewer}
        gr.on([picture.change, checkpoint.change], work, **given, api_visibility="private")
    return page.queue(max_size=limits.waiting, default_concurrency_limit=1)


def _part(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def launch(page, limits: Limits, host: str = "127.0.0.1", port: int = 0) -> str:
    """Start serving a page, in the background.

    Args:
        page: of `build_page`.
        limits: of uploads.
        host: address to serve at.
        port: to serve at; 0 takes a free one.

    Returns:
        The page's address.

    Raises:
        UserError: the port is taken, or cannot be served at.
    """
    import gradio as gr

    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port or None,
            max_file_size=int(limits.upload * 1e6),
            state_session_capacity=KEPT_SESSIONS,
            # Fonts of the visitor's machine: the page fetches nothing from elsewhere.
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            footer_links=[],
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"the page cannot be served at {host}, port {port}: choose another --port ({error})") from None
    return address


def main() -> None:
    """Serve the page from the command line, until Ctrl-C."""
    parser = make_parser(__doc__, EXAMPLES)
    parser.prog = "python -m mit_semseg.demo"
    limits = Limits()
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 is for the whole network")
    parser.add_argument("--port", type=int, default=7860, help="port to serve at; 0 takes a free one")
    parser.add_argument("--examples", metavar="FOLDER", help="pictures to choose from (default: validation pictures)")
    parser.add_argument("--max-upload", type=float, default=limits.upload, metavar="MB", help="of a file")
    parser.add_argument("--max-pixels", type=float, default=limits.pixels, metavar="MILLIONS", help="of a picture")
    parser.add_argument("--max-waiting", type=int, default=limits.waiting, help="pictures in the queue")
    args = parser.parse_intermixed_args()
    cfg = load_config(args.cfg, args.opts)
    setup_logger(filename=None)
    device = pick_devices(args.device)[0]
    networks = Networks(checkpoints_of(cfg), partial(Segmenter.of_options, cfg, device=device))
    networks[networks.names[0]]  # what is wrong with it is said now, not to the first visitor
    logger.info("device: %s", describe(device))
    limits = Limits(args.max_upload, args.max_pixels, args.max_waiting)
    about = f"{cfg.MODEL.arch_encoder} + {cfg.MODEL.arch_decoder}, {cfg.DATASET.num_class} classes."
    page = build_page(networks, limits, examples_of(cfg, args.examples), about)
    logger.info("the page is at %s (Ctrl-C ends it)", launch(page, limits, args.host, args.port))
    page.block_thread()


if __name__ == "__main__":
    run(main)
