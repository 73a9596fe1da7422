"""Labels are the values stored in a file, whatever its format, bit depth, brightness scale and orientation."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scenes import options

from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.dataset.doctor import diagnose
from mit_semseg.dataset.image_io import ImageFileError, image_size, read_image, read_label

HEIGHT, WIDTH = 6, 13  # rows end inside a byte
ORIENTATION = 0x0112
# What a viewer does to show an image of each EXIF orientation upright: numpy on (H, W).
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


def raw_values(most):
    return np.random.default_rng(most).integers(0, most + 1, (HEIGHT, WIDTH))


def packed(values, bits, *, big_endian=True):
    """Rows of a file: most significant bits first, each filled up to a whole byte."""
    if bits == 16:
        return values.astype(">u2" if big_endian else "<u2").tobytes()
    planes = values[..., None] >> np.arange(bits)[::-1] & 1
    return np.packbits(planes.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


def png(values, bits):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    stride = -(-values.shape[1] * bits // 8)
    rows = packed(values, bits)
    rows = b"".join(b"\0" + rows[i : i + stride] for i in range(0, len(rows), stride))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(values, bits, *, white_is_zero=False, low_bits_first=False, orientation=1, deflate=False):
    data = packed(values, bits, big_endian=False)
    if low_bits_first:
        data = np.packbits(np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")).tobytes()
    data = zlib.compress(data) if deflate else data
    tags = {
        256: values.shape[1], 257: values.shape[0], 258: bits, 259: 8 if deflate else 1, 262: int(not white_is_zero),
        266: 2 if low_bits_first else 1, 273: 8, ORIENTATION: orientation, 277: 1, 278: values.shape[0],
        279: len(data),
    }  # fmt: skip
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def pgm(values, most, *, plain=False):
    body = " ".join(map(str, values.ravel())).encode() if plain else packed(values, 8 if most < 256 else 16)
    return b"P%d %d %d %d\n" % (2 if plain else 5, values.shape[1], values.shape[0], most) + body


def pbm(values, *, plain=False):
    body = " ".join(map(str, values.ravel())).encode() if plain else packed(values, 1)
    return b"P%d %d %d\n" % (1 if plain else 4, values.shape[1], values.shape[0]) + body


def bmp(values, bits):
    stride = -(-values.shape[1] * bits // 32) * 4
    rows = packed(values[::-1], bits)
    own = len(rows) // len(values)
    rows = b"".join(rows[i : i + own].ljust(stride, b"\0") for i in range(0, len(rows), own))
    levels = range(2**bits) if bits > 1 else (0, 255)
    palette = b"".join(bytes((level, level, level, 0)) for level in levels)
    offset = 14 + 40 + len(palette)
    header = struct.pack("<2sIHHI", b"BM", offset + len(rows), 0, 0, offset)
    size = values.shape[1], values.shape[0]
    return header + struct.pack("<IiiHHIIiiII", 40, *size, 1, bits, 0, len(rows), 0, 0, 2**bits, 0) + palette + rows


GREY = {
    **{f"png{bits}": png(raw_values(2**bits - 1), bits) for bits in (1, 2, 4, 8, 16)},
    **{
        f"tiff{bits}{'-white-is-zero' * white}{'-low-bits-first' * low}{'-deflate' * deflate}": tiff(
            raw_values(2**bits - 1), bits, white_is_zero=white, low_bits_first=low, deflate=deflate
        )
        for bits in (1, 2, 4, 8, 16)
        for white in (False, True)
        for low in ((False, True) if bits < 16 and not (white and bits == 8) else (False,))
        for deflate in ((False, True) if not low else (False,))
    },
    **{
        f"pgm{most}{'-plain' * plain}": pgm(raw_values(most), most, plain=plain)
        for most in (1, 3, 11, 150, 254, 255, 256, 1000, 65534, 65535)
        for plain in (False, True)
    },
    **{f"pbm{'-plain' * plain}": pbm(raw_values(1), plain=plain) for plain in (False, True)},
    **{f"bmp{bits}": bmp(raw_values(2**bits - 1), bits) for bits in (1, 4, 8)},
}


def most_of(name):
    """The largest value that a file of `GREY` can store."""
    digits = int("".join(filter(str.isdigit, name)) or 1)
    return digits if name.startswith("pgm") else 2**digits - 1


@pytest.mark.parametrize("name", GREY)
def test_stored_values_are_read(tmp_path, name):
    path = tmp_path / "label"
    path.write_bytes(GREY[name])
    assert np.array_equal(np.asarray(read_label(path)), raw_values(most_of(name)))


@pytest.mark.parametrize("suffix", ["tga", "pcx", "png", "tif", "bmp"])
def test_formats_written_by_pillow_keep_their_values(tmp_path, suffix):
    values = raw_values(200).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / f"label.{suffix}")
    assert np.array_equal(np.asarray(read_label(tmp_path / f"label.{suffix}")), values)


@settings(max_examples=60, deadline=None)
@given(most=st.integers(1, 65535), plain=st.booleans(), seed=st.integers(0, 99))
def test_any_maximum_of_a_pgm_file(tmp_path_factory, most, plain, seed):
    values = np.random.default_rng(seed).integers(0, most + 1, (4, 5))
    path = tmp_path_factory.mktemp("pgm") / "label.pgm"
    path.write_bytes(pgm(values, most, plain=plain))
    assert np.array_equal(np.asarray(read_label(path)), values)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.jpg", {"quality": 100}),
        ("a.webp", {"lossless": False}),
        ("a.jp2", {}),
        ("a.tif", {"compression": "jpeg"}),
    ],
)
def test_lossy_labels_are_refused(tmp_path, name, how):
    Image.fromarray(raw_values(11).astype(np.uint8)).save(tmp_path / name, **how)
    with pytest.raises(ImageFileError, match=rf"a\.{name[2:]}: .*PNG"):
        read_label(tmp_path / name)


def test_advice_for_a_grey_label_with_alpha_works(tmp_path):
    values = raw_values(11).astype(np.uint8)
    Image.merge("LA", [Image.fromarray(values), Image.new("L", (WIDTH, HEIGHT), 255)]).save(tmp_path / "label.png")
    with pytest.raises(ImageFileError, match="getchannel") as caught:
        read_label(tmp_path / "label.png")
    code = str(caught.value).partition("alone: ")[2].replace("'label.png'", "target")
    names = {"Image": Image, "f": tmp_path / "label.png", "target": tmp_path / "grey.png"}
    eval(code, names)
    assert np.array_equal(np.asarray(read_label(tmp_path / "grey.png")), values)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["png", "tiff8", "tiff8-deflate", "tiff16", "tiff4-white-is-zero"])
def test_orientation_is_applied_to_images_and_labels(tmp_path, orientation, kind):
    bits = 16 if kind == "tiff16" else 4 if kind.startswith("tiff4") else 8
    values = raw_values(2**bits - 1)
    path = tmp_path / "label.png"
    if kind == "png":
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        Image.fromarray(values.astype(np.uint8)).save(path, exif=exif)
    else:
        how = {"white_is_zero": "white" in kind, "deflate": "deflate" in kind}
        path.write_bytes(tiff(values, bits, orientation=orientation, **how))
    upright = UPRIGHT[orientation](values)
    assert np.array_equal(np.asarray(read_label(path)), upright)
    assert read_label(path).info["orientation"] == read_image(path).info["orientation"] == orientation
    assert image_size(path) == upright.shape[::-1]
    if bits == 8:
        assert np.array_equal(np.asarray(read_image(path))[..., 0], upright)


def oriented_pairs(folder, orientations):
    """Images and labels of equal sides, stored with the given (image, label) orientations."""
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True)
    values = np.random.default_rng(0).integers(1, 4, (16, 16)).astype(np.uint8)
    for number, pair in enumerate(orientations):
        for part, orientation in zip(("images", "annotations"), pair, strict=True):
            exif = Image.Exif()
            exif[ORIENTATION] = orientation
            image = Image.fromarray(values)
            image = image.convert("RGB") if part == "images" else image
            image.save(folder / part / f"{number}.png", exif=exif)
    return folder


def test_image_and_label_are_oriented_alike(tmp_path):
    dataset = ValDataset(oriented_pairs(tmp_path, [(3, 3), (6, 6)]), ".", options())
    for item in dataset:
        assert np.array_equal(item["img_ori"][..., 0], item["seg_label"][0].numpy() + 1)


def test_an_orientation_that_only_one_of_a_pair_has_is_logged_once(tmp_path, caplog):
    folder = oriented_pairs(tmp_path, [(3, 1), (3, 1), (3, 3)])
    for item in ValDataset(folder, ".", options()):
        assert item["seg_label"].shape == (1, 16, 16)
    warnings = [record.getMessage() for record in caplog.records if "orientation" in record.getMessage()]
    assert len(warnings) == 1
    assert "0.png" in warnings[0]


def test_oriented_tiff_images_fill_the_right_bucket(tmp_path):
    for part in ("images", "annotations"):
        (tmp_path / part).mkdir()
    values = raw_values(3)
    (tmp_path / "images" / "a.tif").write_bytes(tiff(values, 8, orientation=6))
    Image.fromarray(np.ascontiguousarray(UPRIGHT[6](values)).astype(np.uint8)).save(tmp_path / "annotations" / "a.png")
    dataset = TrainDataset(tmp_path, ".", options())
    assert dataset.order.upright.tolist() == [True]
    batch = dataset[0]
    assert batch["img_data"].shape[2] > batch["img_data"].shape[3]


def test_the_doctor_lists_pairs_whose_orientations_differ(tmp_path):
    oriented_pairs(tmp_path, [(3, 1), (3, 3)])
    dataset = ValDataset(tmp_path, ".", options())
    report = diagnose(dataset, "val", progress=lambda results, **_: results).report()
    assert "EXIF orientation 3 of the image, 1 of its label (1): images/0.png" in report
