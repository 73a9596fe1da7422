"""Uploaded images of the web page: size limits, and no access to other files or URLs."""

import atexit
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from PIL import Image

from ...dataset.image_io import image_size, read_image
from ...lib.utils import UserError

MAX_NAME_LENGTH = 80  # characters
# No formats that start other programs, as EPS starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


@dataclass(frozen=True)
class Limits:
    """Limits of the web page.

    Attributes:
        upload: file size in megabytes (10^6 bytes).
        pixels: millions of pixels per image.
        waiting: images in the queue; further requests are refused.
    """

    upload: float = 20
    pixels: float = 25
    waiting: int = 20


def safe_name(name) -> str:
    """Return a safe file name for the name of an upload, which can be of any type and content."""
    last = PurePosixPath(str(name or "").replace("\\", "/")).name
    return re.sub(r"[^\w. ()-]", "_", last)[:MAX_NAME_LENGTH].lstrip(".") or "image"


def read_upload(file, name: str, limits: Limits) -> Image.Image:
    """Decode an uploaded image.

    Args:
        file: dict with the `path` of the upload; sent by the browser, so it can be of any type and content.
        name: name for error messages.
        limits: of the image.

    Raises:
        UserError: not an upload of this page, not an image, or above the limits.
    """
    path = file.get("path") if isinstance(file, dict) else None
    if not _is_upload(path):
        raise UserError(f"{name} was not uploaded to this page; upload the image again")
    if not Path(path).is_file():
        raise UserError(f"{name} has expired; upload the image again")
    if (size := Path(path).stat().st_size) > limits.upload * 1e6:
        raise UserError(f"{name} has {size / 1e6:.1f} MB; the limit is {limits.upload:g} MB")
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF is optional in Pillow
    try:
        width, height = image_size(path, formats)
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from None  # do not show paths of the server
    if width * height > limits.pixels * 1e6:
        raise UserError(
            f"{name} has {width} x {height} pixels ({width * height / 1e6:.1f} million); the limit is "
            f"{limits.pixels:g} million; upload a smaller image"
        )
    return read_image(path, name, formats)


def _is_upload(path) -> bool:
    try:
        return isinstance(path, str) and Path(path).resolve().is_relative_to(upload_folder())
    except (OSError, ValueError):  # not a valid path
        return False


def contains_url(value) -> bool:
    """Return whether a request value has a URL as the path of a file, at any depth."""
    if isinstance(value, dict):
        path = str(value.get("path", "")).lower()
        return path.startswith(("http:", "https:")) or any(map(contains_url, value.values()))
    return isinstance(value, list) and any(map(contains_url, value))


class RouteFilter:
    """ASGI middleware that refuses routes of Gradio that fetch URLs or start programs; the page does not use them.

    Args:
        app: ASGI application.
    """

    blocked = re.compile(r"/(file=\s*[a-z][a-z0-9+.-]+:|proxy=|process_recording|run-history)", re.IGNORECASE)

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or not self.blocked.search(scope["path"]):
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": b"this server does not fetch URLs\n"})


@cache
def upload_folder() -> Path:
    """Create the folder for uploads, readable for this user only and deleted at exit; tell Gradio to use it."""
    folder = tempfile.mkdtemp(prefix="mit_semseg-", dir=os.environ.get("GRADIO_TEMP_DIR"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder
    return Path(folder).resolve()
