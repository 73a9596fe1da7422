"""The web page: segmentation of uploads, data for the viewer in the browser, and the Gradio server."""

import base64
import io
import json
import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ...lib.utils import UserError
from ...predict.results import Result
from ...predict.segmenter import Segmenter
from ..common import is_out_of_memory
from .uploads import MAX_NAME_LENGTH, Limits, RouteFilter, contains_url, read_upload, safe_name, upload_folder

logger = logging.getLogger(__name__)

VIEWER = Path(__file__).parent / "viewer"
TITLE = "Semantic segmentation"
WELCOME = "Upload, drop or paste an image, or take a photo, to see its classes here."
JPEG_QUALITY = 92
MAX_NETWORKS = 2  # maximum number of networks in memory
MAX_SESSIONS = 32  # maximum number of visitors whose last result Gradio keeps in memory
DELETE_CACHE = (120, 600)  # seconds between deletions of old uploads, and seconds until an upload is old


class Networks:
    """Segmenters by checkpoint name, loaded on first use. The last `MAX_NETWORKS` used stay in memory.

    Args:
        load: loads a segmenter.
        version: returns a value that changes when the files of a checkpoint change, which is then loaded again.
    """

    def __init__(
        self, names: Sequence[str], load: Callable[[str], Segmenter], version: Callable[[str], object] = lambda name: 0
    ):
        self.names, self.version = names, version
        self._load = lru_cache(MAX_NETWORKS)(lambda name, version: load(name))

    def load(self, name: str) -> Segmenter:
        return self._load(name, self.version(name))

    def __getitem__(self, name: str) -> Segmenter:
        if name not in self.names:
            raise UserError(f"checkpoint {str(name)[:MAX_NAME_LENGTH]!r} does not exist; choose a listed network")
        try:
            return self.load(name)
        except UserError:  # visitors must not see the paths in the message
            logger.exception("network %s cannot be loaded", name)
            raise UserError(f"network {name} cannot be loaded; choose another network") from None


def viewer_value(result: Result) -> dict:
    """Return a dict with the image, the label map and the classes of a result, for viewer/viewer.js."""
    height, width = result.label_map.shape
    wide = len(result.table) > 256
    jpeg, index = io.BytesIO(), io.BytesIO()
    Image.fromarray(result.image).save(jpeg, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    result.render("_index.png").save(index, "PNG")
    labels = result.label_map.astype("<u2" if wide else np.uint8).tobytes()
    return {
        "message": f"{result.path}: {width} x {height} pixels",
        "name": Path(result.path).stem,
        "width": width,
        "height": height,
        "wide": wide,
        "labels": base64.b64encode(zlib.compress(labels, 1)).decode(),
        "image": _data_url("image/jpeg", jpeg.getvalue()),
        "index": _data_url("image/png", index.getvalue()),
        "json": _data_url("application/json", json.dumps(result.as_dict(), indent=1, ensure_ascii=False).encode()),
        "classes": [{**entry, "class": result.table.labels[entry["index"]]} for entry in result.classes],
    }


def _data_url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def segment(networks: Networks, limits: Limits, file: dict | None, checkpoint: str, report: Callable) -> dict:
    """Segment an upload and return a dict for the viewer. After an error, the dict has only `message` and `failed`.

    `file` is the dict that the browser sends for an upload, with `path` and `orig_name`, or None. `report` is called
    with the progress (0..1) and a description.
    """
    if file is None:
        return {"message": WELCOME}
    name = safe_name(file.get("orig_name") if isinstance(file, dict) else None)
    try:
        report(0.05, "reading the image")
        image = read_upload(file, name, limits)
        report(0.15, "loading the network")
        segmenter = networks[checkpoint]
        report(0.35, "segmenting")
        result = replace(segmenter(image), path=name)
        report(0.9, "sending the result")
        return viewer_value(result)
    except UserError as error:
        return {"message": str(error), "failed": True}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        logger.exception("out of memory")
        return {"message": f"{name}: the server is out of memory; upload a smaller image", "failed": True}


def build_page(networks: Networks, limits: Limits, examples: Sequence[str] = (), description: str = ""):
    """Return the page as Gradio `Blocks`, for `launch`; `examples` are paths of example images."""
    try:
        import gradio as gr
    except ImportError:
        raise UserError('gradio is not installed; run pip install -e ".[demo]"') from None

    upload_folder()  # sets GRADIO_TEMP_DIR, which Gradio reads when it creates components

    def on_change(file, checkpoint, progress=gr.Progress()):  # noqa: B008  (required by Gradio)
        return segment(networks, limits, file, checkpoint, lambda value, text: progress(value, desc=text))

    class Page(gr.Blocks):
        """Blocks that refuse URLs, which Gradio would download."""

        def validate_inputs(self, block_fn, inputs):
            if contains_url(inputs):
                raise gr.Error("this page does not fetch URLs; upload the image", print_exception=False)
            super().validate_inputs(block_fn, inputs)

    with Page(title=TITLE, analytics_enabled=False, delete_cache=DELETE_CACHE) as page:
        limit = f"Images up to {limits.upload:g} MB and {limits.pixels:g} million pixels."
        gr.Markdown(f"# {TITLE}\n{description} {limit}")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                sources = ["upload", "clipboard", "webcam"]
                image = gr.Image(type="filepath", sources=sources, label="Image", height=280, elem_id="image")
                names = list(networks.names)
                checkpoint = gr.Dropdown(names, value=names[0], label="Network", elem_id="checkpoint")
                if examples:
                    gr.Examples(list(examples), image, label="Examples")
            with gr.Column(scale=5, min_width=320):
                kinds = {"html_template": "html", "css_template": "css", "js_on_load": "js"}
                files = {key: (VIEWER / f"viewer.{kind}").read_text(encoding="utf-8") for key, kind in kinds.items()}
                viewer = gr.HTML({"message": WELCOME}, elem_id="viewer", **files)
        # Without preprocess=False, Gradio would decode the image before `read_upload` checks the limits.
        options = {"preprocess": False, "show_progress_on": viewer, "api_visibility": "private"}
        gr.on([image.change, checkpoint.change], on_change, [image, checkpoint], viewer, **options)
    return page.queue(max_size=limits.waiting, default_concurrency_limit=1)


def launch(page, limits: Limits, host: str = "127.0.0.1", port: int = 0) -> str:
    """Serve a page from `build_page` in the background, and return the URL. Port 0 selects a free port."""
    import gradio as gr
    from starlette.middleware import Middleware

    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port or None,
            max_file_size=int(limits.upload * 1e6),
            state_session_capacity=MAX_SESSIONS,
            # Use fonts of the visitor's machine, because the default theme downloads fonts.
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            footer_links=[],
            app_kwargs={"middleware": [Middleware(RouteFilter)]},
            run_history=False,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"cannot listen on {host}, port {port}; choose another --port ({error})") from None
    return url
