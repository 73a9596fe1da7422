"""What comes from elsewhere: archives that would leave their folder, connections that end, files that are others."""

import hashlib
import io
import logging
import multiprocessing
import os
import random
import stat
import tarfile
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import here
from scenes import write_pairs

from mit_semseg.lib import archives
from mit_semseg.lib import download as downloads
from mit_semseg.lib.archives import ArchiveError, unpack
from mit_semseg.lib.download import DownloadError, addresses_of, download

CONTENT = random.Random(0).randbytes(3 * downloads.PIECE + 17)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


# Archives


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, kind in members:
            info = zipfile.ZipInfo("x")
            info.filename = name  # the constructor would make it harmless
            info.external_attr = (kind or stat.S_IFREG) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return path


def write_tar(path, members):
    types = {stat.S_IFLNK: tarfile.SYMTYPE, stat.S_IFCHR: tarfile.CHRTYPE, stat.S_IFIFO: tarfile.FIFOTYPE}
    with tarfile.open(path, "w" if path.name.startswith("plain") else "w:gz") as archive:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type = types.get(kind, tarfile.REGTYPE)
            if kind == stat.S_IFLNK:
                info.linkname = content.decode()
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


WRITERS = {"zip": write_zip, "tar": write_tar}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("name", "content", "mode", "message"),
    [
        ("../evil.txt", b"x", 0, "would leave the folder"),
        ("a/../../evil.txt", b"x", 0, "would leave the folder"),
        ("/tmp/evil.txt", b"x", 0, "would leave the folder"),
        ("C:/evil.txt", b"x", 0, "is no plain path"),
        ("..\\evil.txt", b"x", 0, "is no plain path"),
        ("link", b"/etc", stat.S_IFLNK, "is a link"),
        ("device", b"", stat.S_IFCHR, "is a device or pipe"),
        ("pipe", b"", stat.S_IFIFO, "is a device or pipe"),
        ("good.txt", b"again", 0, "is there twice"),
        ("zeros", bytes(40 * 2**20), 0, "decompression bombs"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_a_member_that_is_not_plain_is_refused(tmp_path, kind, name, content, mode, message):
    archive = WRITERS[kind](tmp_path / f"a.{kind}", [("good.txt", b"good", 0), (name, content, mode)])
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ArchiveError, match=message):
        unpack(archive, tmp_path / "out" / "there")
    assert set(tmp_path.rglob("*")) <= before | {tmp_path / "out"}
    assert not Path("/tmp/evil.txt").exists()


def test_hard_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("hard")
        info.type, info.linkname = tarfile.LNKTYPE, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(ArchiveError, match="'hard' in it is a link"):
        unpack(tmp_path / "a.tar", tmp_path / "out")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_good_archive_is_unpacked_whole(tmp_path, kind):
    files = {f"top/{i % 3}/file {i} ü.bin": random.Random(i).randbytes(i * 100) for i in range(20)}
    archive = WRITERS[kind](tmp_path / "a", [(name, content, 0) for name, content in files.items()])
    assert unpack(archive, tmp_path / "all") == len(files)
    assert {name: (tmp_path / "all" / name).read_bytes() for name in files} == files
    unpack(archive, tmp_path / "inner", strip=True)
    assert (tmp_path / "inner" / "1" / "file 1 ü.bin").is_file()
    with pytest.raises(ArchiveError, match="is there already"):
        unpack(archive, tmp_path / "all")
    for limit, message in (
        ({"most_entries": 19}, "more than 19 entries"),
        ({"most_bytes": 900}, "more than 900 bytes"),
    ):
        with pytest.raises(ArchiveError, match=message):
            unpack(archive, tmp_path / "x", **limit)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "all", "inner"]


def test_who_unpacks_the_same_is_left_alone(tmp_path, monkeypatch):
    """Whoever is first has the folder, whole; what interrupted processes have left goes."""
    files = {f"{i}.bin": random.Random(i).randbytes(i * 100) for i in range(20)}
    archive = WRITERS["zip"](tmp_path / "a", [(name, content, 0) for name, content in files.items()])
    left, others = tmp_path / "out.99999999.unpacking", tmp_path / f"out.{os.getppid()}.unpacking"
    for folder in (left, others):
        folder.mkdir()
        (folder / "file").touch()

    def first(*arguments):
        with monkeypatch.context() as context:
            context.setattr(archives.os, "getpid", lambda: 99999998)
            context.setattr(archives, "_extract", extract)
            assert unpack(archive, tmp_path / "out") == 20
        monkeypatch.setattr(archives, "_extract", extract)
        extract(*arguments)

    extract = archives._extract
    monkeypatch.setattr(archives, "_extract", first)
    with pytest.raises(ArchiveError, match="out has been made by somebody else in the meantime"):
        unpack(archive, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out", others.name]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_damaged_archive_leaves_nothing(tmp_path, kind):
    """However it is damaged, it is all there or nothing is; a bit of padding or of a date does not matter."""
    files = [(f"top/{i}.bin", random.Random(i).randbytes(300), 0) for i in range(5)]
    whole = WRITERS[kind](tmp_path / "whole", files).read_bytes()
    rng, refused = random.Random(0), 0
    for turn in range(150):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if turn % 3 == 0 else whole)
        if turn % 3:
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / "a").write_bytes(damaged)
        out = tmp_path / f"out{turn}"
        try:
            unpack(tmp_path / "a", out)
        except ArchiveError as error:
            refused += str(tmp_path / "a") in str(error)
            assert not out.exists()
        else:
            assert sorted(path.read_bytes() for path in out.rglob("*.bin")) == sorted(
                content for _, content, _ in files
            )
        assert not list(tmp_path.glob("*.unpacking"))
    assert refused > 100


def test_no_damaged_header_of_a_plain_tar_file_loses_a_file(tmp_path):
    """`tarfile` takes it for the end; what is in the files themselves has no checksum."""
    files = [(f"{i}.bin", bytes([i]) * 700, 0) for i in range(3)]
    whole = write_tar(tmp_path / "plain", files).read_bytes()
    headers = [512 * block + bit for block in (0, 3, 6) for bit in range(512)]
    for position in headers[::7]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "a").write_bytes(damaged)
        with pytest.raises(ArchiveError):
            unpack(tmp_path / "a", tmp_path / "out")
    for length in range(0, 9 * 512, 256):
        (tmp_path / "a").write_bytes(whole[:length])
        with pytest.raises(ArchiveError):
            unpack(tmp_path / "a", tmp_path / "out")
    assert unpack(tmp_path / "plain", tmp_path / "out") == 3


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_bomb_for_a_name_takes_no_memory(tmp_path, kind):
    """It is read before any member is seen."""
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 200 * 2**20
        archive.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(200):
            archive.fileobj.write(bytes(2**20))
    tracemalloc.start()
    try:
        with pytest.raises(ArchiveError, match="a name in it takes 209715200 bytes"):
            unpack(tmp_path / "a.tar.gz", tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_no_flipped_bit_of_a_zip_file_s_end_loses_a_file(tmp_path):
    """The list of the members, at its end, is what `zipfile` goes by."""
    files = [(f"{i}.bin", bytes([i]) * 20, 0) for i in range(3)]
    whole = write_zip(tmp_path / "whole", files).read_bytes()
    start = whole.index(b"PK\x01\x02")
    for position in range(start, len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "a").write_bytes(damaged)
        out = tmp_path / f"out{position}"
        with suppress(ArchiveError):
            unpack(tmp_path / "a", out)
            assert sorted(path.read_bytes() for path in out.iterdir()) == [content for _, content, _ in files]


def test_the_command_line_unpacks(tmp_path):
    archive = write_zip(tmp_path / "a.zip", [("top/a.txt", b"1", 0), ("top/b.txt", b"2", 0)])
    done = here("mit_semseg.cli.fetch", "unpack", archive, "--strip", "--to", tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, f"2 files unpacked to {tmp_path / 'out'}\n")
    done = here("mit_semseg.cli.fetch", "unpack", archive, "--most-entries", 1, "--to", tmp_path / "more")
    assert done.returncode == 2
    assert "it has more than 1 entries" in done.stderr


# Downloads


def test_download_is_whole_or_nothing(site, tmp_path):
    (site.folder / "a.bin").write_bytes(CONTENT)
    site.marked = False  # nothing to go on with
    target = tmp_path / "files" / "a.bin"
    assert download(f"{site.address}/a.bin", target, sha256=DIGEST[:8].upper()).read_bytes() == CONTENT
    target.unlink()
    site.cuts["/a.bin"] = [1000]
    for url, kwargs, message in (
        (f"{site.address}/a.bin", {}, rf"ended after 1000 of {len(CONTENT)} bytes"),
        (f"{site.address}/a.bin", {"sha256": "00ff"}, f"SHA-256 is {DIGEST}, expected 00ff"),
        (f"{site.address}/none.bin", {}, "404|Not Found"),
        ("http://127.0.0.1:9/a.bin", {}, "refused"),
    ):
        with pytest.raises(DownloadError, match=message):
            download(url, target, **kwargs)
        assert list(target.parent.iterdir()) == []


@given(cuts=st.lists(st.integers(1, len(CONTENT) // 2), max_size=4))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_interrupted_download_goes_on(site, tmp_path, cuts):
    (site.folder / "a.bin").write_bytes(CONTENT)
    target = tmp_path / "b.bin"
    target.unlink(missing_ok=True)
    site.cuts["/a.bin"], site.requests[:] = list(cuts), []
    download(f"{site.address}/a.bin", target, sha256=DIGEST)
    assert target.read_bytes() == CONTENT
    asked = [int(wanted[6:-1]) if wanted else 0 for _, wanted in site.requests]
    reached = [0]
    for cut in cuts:
        if reached[-1] + cut < len(CONTENT):
            reached.append(reached[-1] + cut)
    assert asked == reached[: len(asked)]  # not a byte came twice
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.bin", "site"]


def test_the_next_call_goes_on(site, tmp_path):
    (site.folder / "a.bin").write_bytes(CONTENT)
    site.cuts["/a.bin"] = [1000, 0, 0, 0]
    with pytest.raises(DownloadError, match="ended after 1000"):
        download(f"{site.address}/a.bin", tmp_path / "b.bin")
    assert not (tmp_path / "b.bin").exists()
    site.requests.clear()
    download(f"{site.address}/a.bin", tmp_path / "b.bin")
    assert site.requests == [("/a.bin", "bytes=1000-")]
    assert (tmp_path / "b.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("change", ["other content", "no ranges", "shorter", "other content, sent carelessly"])
def test_what_has_changed_meanwhile_is_fetched_anew(site, tmp_path, change):
    (site.folder / "a.bin").write_bytes(CONTENT)
    site.cuts["/a.bin"] = [1000, 0, 0, 0]
    with pytest.raises(DownloadError):
        download(f"{site.address}/a.bin", tmp_path / "b.bin")
    new = {"no ranges": CONTENT, "shorter": CONTENT[:10]}.get(change, CONTENT[::-1])
    site.ranges, site.careless = change != "no ranges", "carelessly" in change
    (site.folder / "a.bin").write_bytes(new)
    assert download(f"{site.address}/a.bin", tmp_path / "b.bin").read_bytes() == new


def test_a_file_that_is_there_has_the_right_hash(site, tmp_path):
    (site.folder / "a.bin").write_bytes(CONTENT)
    (tmp_path / "a.bin").write_bytes(b"older")
    with pytest.raises(DownloadError, match=r"a\.bin is there already, but its SHA-256 is .*: move it"):
        download(f"{site.address}/a.bin", tmp_path / "a.bin", sha256=DIGEST)
    assert (tmp_path / "a.bin").read_bytes() == b"older"
    assert not site.requests


@pytest.mark.parametrize("target", [".", "folder"])
def test_a_folder_is_no_file_to_download_to(site, tmp_path, monkeypatch, target):
    (site.folder / "a.bin").write_bytes(CONTENT)
    (tmp_path / "folder").mkdir()
    write_pairs(tmp_path / "data", [(20, 20)])
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    for words in (["file", f"{site.address}/a.bin"], ["list", "data"]):
        done = here("mit_semseg.cli.fetch", *words, "--to", target)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {target} is a folder: name the file to write"), done.stderr
    assert set(tmp_path.rglob("*")) == before
    assert not site.requests


def test_a_server_that_does_not_say_how_long_a_file_is(site, tmp_path, caplog):
    (site.folder / "a.bin").write_bytes(CONTENT)
    site.lengths = False
    download(f"{site.address}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert "does not say how long it is" in caplog.text


@pytest.mark.parametrize("answer", [416, 206, 500])
def test_an_answer_to_something_else_is_named(site, tmp_path, answer):
    """416 and 206 are about parts, which nobody has asked for."""
    site.answer = answer
    with pytest.raises(DownloadError, match=rf"{site.address}/a\.bin: "):
        download(f"{site.address}/a.bin", tmp_path / "a.bin")
    assert len(site.requests) == 1
    assert not (tmp_path / "a.bin").exists()


def test_a_part_that_is_too_long_is_not_used(site, tmp_path):
    (site.folder / "a.bin").write_bytes(CONTENT)
    site.cuts["/a.bin"] = [1000, 0, 0, 0]
    with pytest.raises(DownloadError):
        download(f"{site.address}/a.bin", tmp_path / "b.bin")
    with open(tmp_path / "b.bin.part", "ab") as part:
        part.write(CONTENT)
    assert download(f"{site.address}/a.bin", tmp_path / "b.bin", sha256=DIGEST).read_bytes() == CONTENT


def test_encrypted_first():
    assert addresses_of("http://host/a?b=1") == ["https://host/a?b=1", "http://host/a?b=1"]
    assert addresses_of("http://host:80/a") == ["https://host/a", "http://host:80/a"]
    for url in ("https://host/a", "http://host:8080/a", "file:///a", "http://localhost/a"):
        assert addresses_of(url) == [url]


def test_without_encryption_only_after_trying(site, tmp_path, monkeypatch, caplog):
    """The server here does not know how to encrypt; without a hash to compare with that is said."""
    (site.folder / "a.bin").write_bytes(CONTENT)
    url = f"{site.address}/a.bin"
    monkeypatch.setattr(downloads, "addresses_of", lambda url: [url.replace("http:", "https:"), url])
    caplog.set_level(logging.INFO)
    download(url, tmp_path / "b.bin")
    assert f"{url.replace('http:', 'https:')}: " in caplog.text  # why not
    assert "trying without encryption" in caplog.text
    assert "came unencrypted, and there is no SHA-256" in caplog.text
    caplog.clear()
    download(url, tmp_path / "c.bin", sha256=DIGEST)
    assert "trying without encryption" in caplog.text
    assert "came unencrypted" not in caplog.text


def test_no_room_is_said_before_anything_is_written(site, tmp_path, monkeypatch):
    (site.folder / "a.bin").write_bytes(CONTENT)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(DownloadError, match=rf"has {len(CONTENT)} bytes, but the disk of {tmp_path} only 10 left"):
        download(f"{site.address}/a.bin", tmp_path / "b.bin")
    assert [p.name for p in tmp_path.iterdir()] == ["site"]


@pytest.mark.long
def test_several_processes_download_once(site, tmp_path):
    (site.folder / "a.bin").write_bytes(CONTENT)
    context = multiprocessing.get_context("spawn")
    arguments = (f"{site.address}/a.bin", tmp_path / "b.bin")
    processes = [context.Process(target=download, args=arguments, kwargs={"sha256": DIGEST}) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "b.bin").read_bytes() == CONTENT
    assert len(site.requests) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.bin", "site"]
