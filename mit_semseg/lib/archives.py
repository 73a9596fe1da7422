"""Unpacking zip and tar archives that come from elsewhere: all of it, inside its folder, or nothing."""

import errno
import io
import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from .utils import DISK_ERRORS, UserError, WriteError, is_running, progress_bar

MOST_ENTRIES = 1_000_000
MOST_BYTES = 200 * 2**30
PIECE = 1 << 20
# Members of a tar file that hold what does not fit into the header of the next one, and how large one may be.
LONG_NAMES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
LONGEST_NAME = 1 << 20
LONGEST_END = 22 + 65_535 + 20 + 56  # bytes of a zip file's end: record, comment, and what large files have before
MOST_GROWTH = 100  # pictures hardly shrink when they are packed; bombs do a thousand times and more


class ArchiveError(UserError, RuntimeError):
    """An archive that is not unpacked; the message names it, its member, and why."""


class _TarInfo(tarfile.TarInfo):
    """Headers of a tar file. `tarfile` takes a damaged one for the end, and reads names of any length into memory."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a header in it is damaged ({error})") from None
        if info.type in LONG_NAMES and info.size > LONGEST_NAME:
            raise tarfile.ReadError(f"a name in it takes {info.size} bytes")
        return info


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    what: str  # 'file', 'folder', 'padding', or what is refused
    open: Callable[[], BinaryIO]


def unpack(
    archive: Path, folder: Path, *, strip: bool = False, most_bytes: int = MOST_BYTES, most_entries: int = MOST_ENTRIES
) -> int:
    """Unpack an archive into a new folder, which is there when all of it is.

    Args:
        archive: a zip or tar file, compressed or not.
        folder: to be made.
        strip: leave out the one folder that everything in the archive is in.
        most_bytes, most_entries: of what is unpacked.

    Returns:
        The number of files.

    Raises:
        ArchiveError: the archive is damaged; a member would leave the folder, or is a link, a device, encrypted or
            there twice; it unpacks to too much; or the folder exists.
        WriteError: there is no room for it.
    """
    if folder.exists() or folder.is_symlink():
        raise ArchiveError(f"{folder} is there already: move it away, or choose another folder")
    if not archive.is_file():
        raise ArchiveError(f"there is no archive {archive}")
    # A folder of its own: others may be unpacking the same.
    unpacking = folder.with_name(f"{folder.name}.{os.getpid()}.unpacking")
    _remove_what_was_left(folder)
    try:
        with _opened(archive) as opened:
            members = _checked(archive, _members(opened), most_bytes, most_entries)
            room = shutil.disk_usage(_existing(folder.parent)).free
            if (size := sum(member.size for member in members)) > room:
                raise ArchiveError(f"{archive} unpacks to {size} bytes, but the disk of {folder} has only {room} left")
            unpacking.mkdir(parents=True)
            for member in progress_bar(members, desc=f"unpacking {archive.name}", unit="file"):
                _extract(member, unpacking)
        try:
            os.replace(_inside(unpacking, archive) if strip else unpacking, folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise ArchiveError(f"{folder} has been made by somebody else in the meantime") from None
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)
    return sum(member.what == "file" for member in members)


def _remove_what_was_left(folder: Path) -> None:
    """Remove what interrupted processes of this machine have unpacked of a folder."""
    for path in folder.parent.glob(f"{escape(folder.name)}.*.unpacking"):
        number = path.name.split(".")[-2]
        if number.isdecimal() and (int(number) == os.getpid() or not is_running(int(number))):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    """An archive; what is wrong with it in here, names it."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                _check_count(archive, opened)
                yield opened
        else:
            with tarfile.open(archive, tarinfo=_TarInfo) as opened:
                yield opened
    except UserError:
        raise
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise WriteError(f"{archive} cannot be unpacked: {error.strerror}") from None
        if error.filename:
            raise
        raise ArchiveError(f"{archive} is damaged: {error}") from None
    except Exception as error:  # the readers meet damaged bytes with any exception there is
        raise ArchiveError(f"{archive} is damaged, or no zip or tar archive: {error}") from None


def _check_count(archive: Path, opened: zipfile.ZipFile) -> None:
    """Compare the entries that were found with their number at the end of a zip file: where the list of them is
    damaged, `zipfile` finds fewer and says nothing."""
    with open(archive, "rb") as file:
        file.seek(max(0, archive.stat().st_size - LONGEST_END))
        tail = file.read()
    count = int.from_bytes(tail[tail.rfind(b"PK\x05\x06") :][10:12], "little")
    if (large := tail.rfind(b"PK\x06\x06")) >= 0:  # of more than 65,535 entries
        count = int.from_bytes(tail[large:][32:40], "little")
    found = len(opened.infolist())
    if found != count and (large >= 0 or found % 2**16 != count):  # some programs count modulo 2^16 instead
        raise ValueError(f"it should have {count} entries, {found} are found")


def _members(opened: zipfile.ZipFile | tarfile.TarFile) -> Iterator[_Member]:
    if isinstance(opened, tarfile.TarFile):
        for info in opened:
            what = "file" if info.isreg() else "folder" if info.isdir() else "a link" if info.islnk() else ""
            what = what or ("a link" if info.issym() else "a device or pipe")
            yield _Member(info.name, info.size, what, partial(opened.extractfile, info))
        # What comes after the last member is read as well: a checksum, at which a damaged archive is recognized.
        while rest := opened.fileobj.read(PIECE):
            yield _Member("(padding)", len(rest), "padding", io.BytesIO)
        return
    for info in opened.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        what = "folder" if info.is_dir() else "file"
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            what = "a link" if kind == stat.S_IFLNK else "a device or pipe"
        if info.flag_bits & 1:
            what = "encrypted"
        yield _Member(info.orig_filename, info.file_size, what, partial(opened.open, info))


def _checked(archive: Path, members: Iterable[_Member], most_bytes: int, most_entries: int) -> list[_Member]:
    """The members, of which none has been unpacked yet."""
    checked, names, size = [], set(), 0
    packed = archive.stat().st_size
    for member in members:
        size += member.size
        if member.what != "padding":
            checked.append(member)
        if reason := _refusal(member, names):
            raise ArchiveError(f"{archive} is not unpacked: {member.name!r} in it {reason}")
        if len(checked) > most_entries:
            raise ArchiveError(f"{archive} is not unpacked: it has more than {most_entries} entries")
        if size > most_bytes:
            raise ArchiveError(f"{archive} is not unpacked: it holds more than {most_bytes} bytes")
        if size > MOST_GROWTH * packed + 2**20:
            raise ArchiveError(
                f"{archive} is not unpacked: its {packed} bytes unpack to more than {MOST_GROWTH} times as much, as "
                f"those of decompression bombs do"
            )
    if not names:
        raise ArchiveError(f"{archive} holds no files")
    return checked


def _refusal(member: _Member, names: set[str]) -> str:
    """Why a member is not unpacked, '' if it is; notes the names of files."""
    path = PurePosixPath(member.name)
    if member.what not in ("file", "folder", "padding"):
        return f"is {member.what}"
    if not member.name or "\0" in member.name or "\\" in member.name or re.match("[A-Za-z]:", member.name):
        return "is no plain path"
    if path.is_absolute() or ".." in path.parts:
        return "would leave the folder"
    if member.what == "file":
        if str(path) in names:
            return "is there twice"
        names.add(str(path))
    return ""


def _extract(member: _Member, folder: Path) -> None:
    target = folder / PurePosixPath(member.name)
    if member.what == "folder":
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with member.open() as source, open(target, "xb") as out:
        shutil.copyfileobj(source, out)
    if (size := target.stat().st_size) != member.size:
        raise ValueError(f"{member.name} has {size} bytes, and should have {member.size}")


def _inside(unpacking: Path, archive: Path) -> Path:
    inner = list(unpacking.iterdir())
    if len(inner) != 1 or not inner[0].is_dir():
        raise ArchiveError(f"{archive} does not hold one folder, but {len(inner)} files and folders")
    return inner[0]


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder
