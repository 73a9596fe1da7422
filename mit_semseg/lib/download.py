"""Downloads that are whole or not there, and go on where they were interrupted."""

import hashlib
import json
import logging
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from .utils import UserError, progress_bar

try:
    import fcntl
except ImportError:  # Windows, where two processes that download the same file at once are not told apart
    fcntl = None

logger = logging.getLogger(__name__)

TIMEOUT = 15  # seconds without a byte after which a server counts as not answering
ATTEMPTS = 3  # connections, one after the other, that may end early without having brought anything
PIECE = 1 << 20


class DownloadError(UserError, RuntimeError):
    """A file that could not be had; the message names its address and says why."""


class _Interrupted(DownloadError):
    """A connection that ended early, after which another may go on."""


def addresses_of(url: str) -> list[str]:
    """Where to ask for an address: of a plain one without a port first by an encrypted connection."""
    parts = urlsplit(url)
    if parts.scheme == "http" and parts.port in (None, 80) and parts.hostname != "localhost":
        return [parts._replace(scheme="https", netloc=parts.netloc.removesuffix(":80")).geturl(), url]
    return [url]


def download(url: str, path: Path, *, sha256: str = "") -> Path:
    """Download a file; under its final name there is the whole file or nothing.

    What has come before an interruption is kept as `<name>.part`, with which this or the next call goes on if the
    server says that it still has the same file. A second process waits for the first one.

    Args:
        url: http, https or file address; a plain http one is tried as https first.
        path: final name; its folder is made.
        sha256: hexadecimal digest, or its beginning; '' is not checked.

    Raises:
        DownloadError: the server does not answer, what came is not the file, or there is no room for it.
    """
    if not path.name or os.path.isdir(path):
        raise DownloadError(f"{path} is a folder: name the file to write {url} to")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _Part(path) as part:
        if path.is_file():  # another process may have brought it in the meantime
            if sha256 and not (digest := _digest(path)).startswith(sha256.lower()):
                raise DownloadError(f"{path} is there already, but its SHA-256 is {digest}, expected {sha256}: move it")
            return path
        *encrypted, last = addresses_of(url)
        for address in encrypted:
            try:
                return _fetch(address, path, part, sha256)
            except DownloadError as error:
                logger.info("%s; trying without encryption", error)
        _fetch(last, path, part, sha256)
        if encrypted and not sha256:
            logger.warning("%s came unencrypted, and there is no SHA-256 to compare it with", last)
        return path


class _Part:
    """What has come of a file, what it is a part of, and that no other process writes to it."""

    def __init__(self, path: Path):
        self.path = path.with_name(f"{path.name}.part")
        self.about = path.with_name(f"{path.name}.part.json")
        self._lock = path.with_name(f"{path.name}.lock")

    def __enter__(self) -> "_Part":
        while True:
            self._held = open(self._lock, "wb")
            if self._is_held():
                return self
            self._held.close()

    def _is_held(self) -> bool:
        """Wait for the lock; False if who had it has removed its file, so that another one is needed."""
        if not fcntl:
            return True
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that downloads %s", self.path.stem)
            fcntl.flock(self._held, fcntl.LOCK_EX)
        except OSError:  # a disk without locks
            return True
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._held.fileno()), self._lock.stat())
        return False

    def __exit__(self, *_) -> None:
        if not fcntl:  # Windows removes no file that is open
            self._held.close()
        self._lock.unlink(missing_ok=True)
        self._held.close()

    def received(self, url: str) -> tuple[int, str]:
        """Bytes of this address that are there, and by what the server knows its file again; (0, '') for none."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            about = json.loads(self.about.read_text(encoding="utf-8"))
            if about["url"] == url and about["mark"]:
                return self.path.stat().st_size, about["mark"]
        return 0, ""

    def begin(self, url: str, mark: str) -> None:
        """Note what the part is of."""
        self.about.write_text(json.dumps({"url": url, "mark": mark}), encoding="utf-8")

    def drop(self) -> None:
        """Forget it."""
        self.path.unlink(missing_ok=True)
        self.about.unlink(missing_ok=True)


def _fetch(url: str, path: Path, part: _Part, sha256: str) -> Path:
    """Download from one address, in several connections where one ends early."""
    left, before = ATTEMPTS, 0
    while True:
        try:
            _receive(url, part)
            break
        except _Interrupted:
            there, mark = part.received(url)
            left = ATTEMPTS if there > before else left - 1
            if not mark:
                part.drop()
            if not left or not mark:
                raise
            before = there
            logger.info("%s: the connection ended after %d bytes, going on from there", url, there)
    if sha256 and not (digest := _digest(part.path)).startswith(sha256.lower()):
        part.drop()
        raise DownloadError(f"{url}: SHA-256 is {digest}, expected {sha256}")
    os.replace(part.path, path)
    part.drop()
    return path


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _mark(headers: Message) -> str:
    """By what a server knows a file again, '' for nothing: https://www.rfc-editor.org/rfc/rfc9110#field.if-range"""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified", "")


def _is_the_rest(headers: Message, there: int, mark: str) -> bool:
    """Whether a part that came is what follows, of the same file."""
    return bool(
        there and headers.get("Content-Range", "").startswith(f"bytes {there}-") and _mark(headers) in ("", mark)
    )


def _receive(url: str, part: _Part) -> None:
    """One connection: the rest of a part, or all of the file."""
    there, mark = part.received(url)
    request = urllib.request.Request(url)
    if there:
        request.add_header("Range", f"bytes={there}-")
        request.add_header("If-Range", mark)
    with _explained(url):
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code != 416 or not there:  # no bytes from there on: the part is not of this file
                raise
            part.drop()
            return _receive(url, part)
        with response:
            if url.startswith("https:") and not response.url.startswith("https:"):
                raise DownloadError(f"{url} leads to {response.url}, which is not encrypted")
            goes_on = response.status == 206
            if goes_on and not _is_the_rest(response.headers, there, mark):
                if not there:
                    raise DownloadError(f"{url}: the server sends a part, and was asked for the whole")
                part.drop()
                return _receive(url, part)
            length = int(response.headers.get("Content-Length") or 0)
            if not {"content-length", "transfer-encoding"} & set(map(str.lower, response.headers)):
                logger.warning("%s: the server does not say how long it is, only a SHA-256 tells if it is whole", url)
            if not goes_on:
                there = 0
                part.begin(url, _mark(response.headers))
            free = shutil.disk_usage(part.path.parent).free
            if length > free:
                part.drop()
                raise DownloadError(f"{url} has {length} bytes, but the disk of {part.path.parent} only {free} left")
            with open(part.path, "ab" if goes_on else "wb") as out:
                received = _copy(response, out, there, length, part.path.stem)
        if length and received != length:
            raise _Interrupted(f"{url}: the connection ended after {there + received} of {there + length} bytes")


def _copy(response: BinaryIO, out: BinaryIO, there: int, length: int, name: str) -> int:
    """Write what comes; returns how many bytes that were."""
    received = 0
    with progress_bar(total=there + length or None, initial=there, unit="B", unit_scale=True, desc=name) as bar:
        while piece := response.read(PIECE):
            out.write(piece)
            received += len(piece)
            bar.update(len(piece))
    return received


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what goes wrong on the way into one sentence."""
    try:
        yield
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{url}: {error}") from None
    except (ConnectionResetError, TimeoutError, HTTPException) as error:
        raise _Interrupted(f"{url}: {error or type(error).__name__}") from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise DownloadError(f"{url}: {getattr(error, 'reason', error)}") from None
