"""Stored label values are read for any file format, bit depth, photometric interpretation and orientation."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from scenes import options

from mit_semseg.dataset import ValDataset
from mit_semseg.dataset.doctor import inspect_dataset
from mit_semseg.dataset.image_io import ImageFileError, image_size, read_image, read_label

HEIGHT, WIDTH = 6, 13  # 13 pixels of 1, 2 or 4 bits do not fill the last byte
ORIENTATION = 0x0112
# For every EXIF orientation, a function that makes an array (H, W) upright.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.T,
    6: lambda x: x.T[:, ::-1],
    7: lambda x: x[::-1, ::-1].T,
    8: lambda x: x.T[::-1],
}


def random_values(maximum):
    return np.random.default_rng(maximum).integers(0, maximum + 1, (HEIGHT, WIDTH))


def pack(values, bits, *, big_endian=True):
    """Return values (H, W) packed into bytes row by row, most significant bits first."""
    if bits == 16:
        return values.astype(">u2" if big_endian else "<u2").tobytes()
    planes = values[..., None] >> np.arange(bits)[::-1] & 1
    return np.packbits(planes.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


def png(values, bits):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    stride = -(-values.shape[1] * bits // 8)
    rows = pack(values, bits)
    rows = b"".join(b"\0" + rows[i : i + stride] for i in range(0, len(rows), stride))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(values, bits, *, white_is_zero=False, orientation=1, deflate=False):
    data = pack(values, bits, big_endian=False)
    data = zlib.compress(data) if deflate else data
    tags = {
        256: values.shape[1], 257: values.shape[0], 258: bits, 259: 8 if deflate else 1, 262: int(not white_is_zero),
        273: 8, ORIENTATION: orientation, 277: 1, 278: values.shape[0], 279: len(data),
    }  # fmt: skip
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def netpbm(values, maximum, *, plain=False):
    """Return a PGM file with this maximum value, or a PBM file (one bit per pixel) if `maximum` is 0."""
    bits = 1 if not maximum else 8 if maximum < 256 else 16
    kind = (2 if plain else 5) - (not maximum)
    body = " ".join(map(str, values.ravel())).encode() if plain else pack(values, bits)
    return b"P%d %d %d%s\n" % (kind, values.shape[1], values.shape[0], b" %d" % maximum if maximum else b"") + body


BOTH = (False, True)
GRAY = [(png, bits, {}) for bits in (1, 2, 4, 8, 16)]
GRAY += [(tiff, b, {"white_is_zero": w, "deflate": d}) for b in (1, 2, 4, 8, 16) for w in BOTH for d in BOTH]
GRAY += [(netpbm, m, {"plain": p}) for m in (0, 1, 11, 150, 254, 255, 256, 1000, 65534, 65535) for p in BOTH]


@pytest.mark.parametrize(("encode", "number", "arguments"), GRAY)
def test_stored_values_are_read(tmp_path, encode, number, arguments):
    """`number` is the number of bits in PNG and TIFF files, and the maximum value in Netpbm files."""
    values = random_values((number or 1) if encode is netpbm else 2**number - 1)
    (tmp_path / "label").write_bytes(encode(values, number, **arguments))
    assert np.array_equal(np.asarray(read_label(tmp_path / "label")), values)


@pytest.mark.parametrize(
    ("name", "mode", "arguments", "message"),
    [
        ("a.jpg", "L", {"quality": 100}, "PNG"),
        ("a.webp", "L", {"lossless": False}, "PNG"),
        ("a.tif", "L", {"compression": "jpeg"}, "PNG"),
        ("a.tif", "P", {}, r"DATASET\.label_format palette"),
        ("a.tif", "RGBA", {}, "mode L"),
        ("a.png", "LA", {}, "getchannel"),
        ("a.tif", "F", {}, "astype"),
    ],
)
def test_lossy_and_non_gray_labels_are_errors_with_a_fix(tmp_path, name, mode, arguments, message):
    Image.fromarray(random_values(11).astype(np.uint8)).convert(mode).save(tmp_path / name, **arguments)
    with pytest.raises(ImageFileError, match=rf"a\.{name[2:]}: .*{message}"):
        read_label(tmp_path / name)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["png", "tiff8", "tiff8-deflate", "tiff16", "tiff4-white-is-zero"])
def test_exif_and_tiff_orientation_are_applied_to_images_and_labels(tmp_path, orientation, kind):
    bits = 16 if kind == "tiff16" else 4 if kind.startswith("tiff4") else 8
    values = random_values(2**bits - 1)
    path = tmp_path / "label.png"
    if kind == "png":
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        Image.fromarray(values.astype(np.uint8)).save(path, exif=exif)
    else:
        arguments = {"white_is_zero": "white" in kind, "deflate": "deflate" in kind}
        path.write_bytes(tiff(values, bits, orientation=orientation, **arguments))
    upright = UPRIGHT[orientation](values)
    assert np.array_equal(np.asarray(read_label(path)), upright)
    assert read_label(path).info["orientation"] == read_image(path).info["orientation"] == orientation
    assert image_size(path) == upright.shape[::-1]
    if bits == 8:
        assert np.array_equal(np.asarray(read_image(path))[..., 0], upright)


def write_oriented_pairs(folder, orientations):
    """Write a square image and label for each pair of EXIF orientations (image, label)."""
    values = Image.fromarray(np.random.default_rng(0).integers(1, 4, (16, 16)).astype(np.uint8))
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True)
    for index, pair in enumerate(orientations):
        for part, mode, orientation in zip(("images", "annotations"), ("RGB", "L"), pair, strict=True):
            exif = Image.Exif()
            exif[ORIENTATION] = orientation
            values.convert(mode).save(folder / part / f"{index}.png", exif=exif)
    return folder


def test_image_and_label_get_the_same_orientation(tmp_path):
    for item in ValDataset(write_oriented_pairs(tmp_path, [(3, 3), (6, 6)]), ".", options()):
        assert np.array_equal(item["img_ori"][..., 0], item["seg_label"][0].numpy() + 1)


def test_different_orientations_of_image_and_label_are_logged_once_and_listed_by_the_doctor(tmp_path, caplog):
    dataset = ValDataset(write_oriented_pairs(tmp_path, [(3, 1), (3, 1), (3, 3)]), ".", options())
    for item in dataset:
        assert item["seg_label"].shape == (1, 16, 16)
    warnings = [record.getMessage() for record in caplog.records if "orientation" in record.getMessage()]
    assert len(warnings) == 1
    assert "0.png" in warnings[0]
    notes = inspect_dataset(dataset, "val").notes
    assert ["images/0.png", "images/1.png"] in [images for note, images in notes.items() if "of its label" in note]
