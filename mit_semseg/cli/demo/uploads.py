"""What visitors of the page send: pictures within limits, and nothing that makes this machine read or fetch more."""

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

LONGEST_NAME = 80  # characters of a picture's name that are kept
# Of files that visitors may send: none that start other programs, as EPS does, or that nobody's camera makes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


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


def called(name) -> str:
    """A name fit to be shown and to be that of a file, of whatever a visitor's browser says the picture is called."""
    last = PurePosixPath(str(name or "").replace("\\", "/")).name
    return re.sub(r"[^\w. ()-]", "_", last)[:LONGEST_NAME].lstrip(".") or "picture"


def read_upload(given, name: str, limits: Limits) -> Image.Image:
    """A picture that came from a visitor.

    Args:
        given: what the visitor's browser says there is, which may be anything: a dict with the `path` of an upload.
        name: that messages call it.
        limits: of the picture.

    Raises:
        UserError: no upload of this page, no picture, or one that is too large.
    """
    path = given.get("path") if isinstance(given, dict) else None
    # Any path may be asked for, but only what was uploaded is looked at.
    if not _is_upload(path):
        raise UserError(f"{name} is no upload of this page: choose the picture again")
    if not Path(path).is_file():
        raise UserError(f"{name} has been deleted in the meantime: choose the picture again")
    if (size := Path(path).stat().st_size) > limits.upload * 1e6:
        raise UserError(f"{name} has {size / 1e6:.1f} MB; this page takes up to {limits.upload:g} MB")
    try:
        width, height = image_size(path, _formats())
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from None
    if width * height > limits.pixels * 1e6:
        raise UserError(
            f"{name} has {width} x {height} pixels ({width * height / 1e6:.1f} million); this page takes up to "
            f"{limits.pixels:g} million: make it smaller"
        )
    return read_image(path, name, _formats())


def _is_upload(path) -> bool:
    try:
        return isinstance(path, str) and Path(path).resolve().is_relative_to(uploads())
    except (OSError, ValueError):  # no path at all
        return False


def names_an_address(value) -> bool:
    """Whether a visitor's values have an address of the web for the path of a file, at any depth."""
    if isinstance(value, dict):
        path = str(value.get("path", "")).lower()
        return path.startswith(("http:", "https:")) or any(map(names_an_address, value.values()))
    return isinstance(value, list) and any(map(names_an_address, value))


def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


class Gate:
    """ASGI middleware in front of the page: refuses the routes of Gradio that fetch an address of the web for whoever
    asks, or start a program on a file, none of which the page uses.

    Args:
        app: of the page.
    """

    closed = re.compile(r"/(file=\s*[a-z][a-z0-9+.-]+:|proxy=|process_recording|run-history)", re.IGNORECASE)

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or not self.closed.search(scope["path"]):
            await self._app(scope, receive, send)
            return
        head = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 403, "headers": head})
        await send({"type": "http.response.body", "body": b"this page fetches nothing from elsewhere\n"})


@cache
def uploads() -> Path:
    """The folder of the uploads, where Gradio has its place for files or else the system: of this process and its user
    alone, and deleted at its end."""
    folder = tempfile.mkdtemp(prefix="mit_semseg-", dir=os.environ.get("GRADIO_TEMP_DIR"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder
    return Path(folder).resolve()
