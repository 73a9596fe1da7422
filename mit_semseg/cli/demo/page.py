"""The page of `demo.py`: what the viewer in the browser gets, and how it is served."""

import base64
import io
import json
import logging
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ...lib.utils import UserError
from ...predict.results import Result
from ...predict.segmenter import Segmenter
from ..common import is_out_of_memory
from .uploads import LONGEST_NAME, Gate, Limits, called, names_an_address, read_upload, uploads

logger = logging.getLogger(__name__)

VIEWER = Path(__file__).parent / "viewer"
TITLE = "Scene parsing"
WELCOME = "Choose, drop, paste or photograph a picture: its classes are shown here."
QUALITY = 92  # of the JPEG that travels to the browser
KEPT_NETWORKS = 2  # in memory
KEPT_SESSIONS = 32  # visitors whose last result Gradio holds in memory, to show it again after a lost connection
UPLOADS_CHECKED, UPLOADS_KEPT = 120, 600  # seconds


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
            try:
                self.load(name)
            except UserError:  # names files of this machine, which are not the visitors' business
                logger.exception("%s cannot be loaded", name)
                raise UserError(f"the network {name} cannot be loaded now: choose another") from None
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def load(self, name: str) -> None:
        """Load a network; the oldest goes.

        Raises:
            UserError: it cannot be loaded, with the reason.
        """
        self._loaded[name] = self._load(name)
        while len(self._loaded) > KEPT_NETWORKS:
            self._loaded.popitem(last=False)


def shown(result: Result) -> dict:
    """What the page's viewer (viewer/viewer.js) shows of a result, in plain values."""
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
    name = called(given.get("orig_name") if isinstance(given, dict) else None)
    try:
        step(0.05, "reading the picture")
        picture = read_upload(given, name, limits)
        step(0.15, "loading the network")
        segmenter = networks[checkpoint]
        step(0.35, "segmenting")
        result = replace(segmenter(picture), path=name)
        step(0.9, "sending the result")
        return shown(result)
    except UserError as error:
        return {"message": str(error), "wrong": True}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
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

    uploads()  # Gradio reads the place when its components are made

    def work(given, checkpoint, progress=gr.Progress()):  # noqa: B008  (how Gradio hands it over)
        return segment(networks, limits, given, checkpoint, lambda share, text: progress(share, desc=text))

    class Page(gr.Blocks):
        """Blocks that fetch nothing: Gradio would download a picture whose path is said to be a public address."""

        def validate_inputs(self, block_fn, inputs):
            if names_an_address(inputs):
                raise gr.Error("this page fetches no pictures from elsewhere: upload it", print_exception=False)
            super().validate_inputs(block_fn, inputs)

    with Page(title=TITLE, analytics_enabled=False, delete_cache=(UPLOADS_CHECKED, UPLOADS_KEPT)) as page:
        gr.Markdown(f"# {TITLE}\n{about} Pictures of up to {limits.upload:g} MB and {limits.pixels:g} million pixels.")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                ways = ["upload", "clipboard", "webcam"]
                picture = gr.Image(type="filepath", sources=ways, label="Picture", height=280, elem_id="picture")
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
    return (VIEWER / name).read_text(encoding="utf-8")


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
    from starlette.middleware import Middleware

    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port or None,
            max_file_size=int(limits.upload * 1e6),
            state_session_capacity=KEPT_SESSIONS,
            # Fonts of the visitor's machine: the page fetches nothing from elsewhere.
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            footer_links=[],
            app_kwargs={"middleware": [Middleware(Gate)]},
            run_history=False,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"the page cannot be served at {host}, port {port}: choose another --port ({error})") from None
    return address
