"""Check uploads to the web page: limit the size, and refuse URLs and files that were not uploaded."""

import atexit
import os
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from ...dataset.image_io import image_size, read_image
from ...lib.utils import UserError

MAX_NAME_LENGTH = 80  # maximum length of a file name in characters
# Allowed image formats. EPS is not allowed, because Pillow would start another program (Ghostscript).
MAX_SIDE = 65500  # in pixels; the page shows images as JPEG files, which are at most this wide and high
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


class Limits(NamedTuple):
    """Limits for uploads to the web page."""

    upload: float = 20  # maximum file size in megabytes (10^6 bytes)
    pixels: float = 25  # maximum image size in million pixels
    waiting: int = 20  # maximum number of images in the queue; further requests are refused


def safe_name(name) -> str:
    """Convert a name sent by the browser, which can have any type and content, to a safe file name."""
    last = PurePosixPath(str(name or "").replace("\\", "/")).name
    return re.sub(r"[^\w. ()-]", "_", last)[:MAX_NAME_LENGTH].lstrip(".") or "image"


def read_upload(file, name: str, limits: Limits) -> Image.Image:
    """Decode an uploaded image; raise a `UserError` with `name` if the file is missing, too large or not an image.

    `file` is sent by the browser. It should be a dict with the key `path`, but can have any type and content.
    """
    path = file.get("path") if isinstance(file, dict) else None
    try:
        is_upload = isinstance(path, str) and Path(path).resolve().is_relative_to(upload_folder())
    except (OSError, ValueError):  # not a valid path
        is_upload = False
    if not is_upload or not Path(path).is_file():
        raise UserError(f"{name} was not uploaded to this page, or has expired; upload the image again")
    if (size := Path(path).stat().st_size) > limits.upload * 1e6:
        raise UserError(f"{name} has a size of {size / 1e6:.1f} MB; the limit is {limits.upload:g} MB")
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF is optional in Pillow
    try:
        width, height = image_size(path, formats)
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from None  # hide the path on the server
    if width * height > limits.pixels * 1e6:
        raise UserError(f"{name} has {width} x {height} pixels; the limit is {limits.pixels:g} million pixels")
    if max(width, height) > MAX_SIDE:
        raise UserError(f"{name} has {width} x {height} pixels; the longest side can have {MAX_SIDE} pixels")
    return read_image(path, name, formats)


def contains_url(value) -> bool:
    """Return whether a value in a request is, or contains at any depth, a dict whose `path` is a URL."""
    if isinstance(value, dict):
        path = str(value.get("path", "")).lower()
        return path.startswith(("http:", "https:")) or any(map(contains_url, value.values()))
    return isinstance(value, list) and any(map(contains_url, value))


class RouteFilter:
    """ASGI middleware that blocks Gradio routes that fetch URLs or start programs; the page does not use them."""

    blocked = re.compile(r"/(file=\s*[a-z][a-z0-9+.-]+:|proxy=|process_recording|run-history)", re.IGNORECASE)

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        from starlette.responses import PlainTextResponse

        blocked = scope["type"] == "http" and self.blocked.search(scope["path"])
        app = PlainTextResponse("this server does not fetch URLs\n", 403) if blocked else self._app
        await app(scope, receive, send)


@cache
def upload_folder() -> Path:
    """Return a private folder for uploads, which Gradio uses too. It is created on first use and deleted at exit."""
    folder = tempfile.mkdtemp(prefix="mit_semseg-", dir=os.environ.get("GRADIO_TEMP_DIR"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder
    return Path(folder).resolve()
