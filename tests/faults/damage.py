"""A data set in which everything is wrong once."""

import json
import struct
import zlib

import numpy as np
from PIL import Image

SIZE = (48, 40)


def _png(width: int, height: int, data: bytes) -> bytes:
    """A grey PNG whose header promises a size, whatever its data."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


class Writer:
    """Writes pictures and labels of three classes into a folder below `root`, and the list of them."""

    def __init__(self, root, name: str):
        self.root, self.name, self.rng, self.lines = root, name, np.random.default_rng(0), []
        self.folder = folder = root / name
        for name in ("images", "labels"):
            (folder / name).mkdir(parents=True)

    def picture(self, size=SIZE) -> Image.Image:
        return Image.fromarray(self.rng.integers(0, 256, (size[1], size[0], 3), np.uint8))

    def label(self, size=SIZE) -> Image.Image:
        return Image.fromarray(self.rng.integers(0, 4, (size[1], size[0]), np.uint8))

    def add(self, name: str, picture=None, label=None, *, size=SIZE, **how) -> None:
        """A record; picture and label are images, the bytes of files, or good ones."""
        image, annotation = self.folder / "images" / name, self.folder / "labels" / f"{name.rpartition('.')[0]}.png"
        for path, content in ((image, picture), (annotation, label)):
            if content is None:
                content = self.picture(size) if path == image else self.label(size)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content.save(path, **(how if path == image else {}))
        self.listed(name, annotation.name)

    def values(self, kind) -> Image.Image:
        """A label in pixels of another kind."""
        return Image.fromarray(np.asarray(self.label()).astype(kind))

    def listed(self, image: str, label: str) -> None:
        self.lines.append(
            json.dumps({"fpath_img": f"{self.name}/images/{image}", "fpath_segm": f"{self.name}/labels/{label}"})
        )


def write_unusable(root) -> list[str]:
    """Write `unusable.odgt`, a list of what cannot be used, and the folder `broken`.

    Returns:
        What names every one of them, in order.
    """
    to = Writer(root, "broken")
    folder = to.folder
    whole = folder / "images" / "whole.jpg"
    to.picture((200, 160)).save(whole)
    to.add("truncated.jpg", whole.read_bytes()[:2000], size=(200, 160))
    whole.unlink()
    to.add("zero_bytes.png", b"")
    wrong = bytearray(_png(*SIZE, b"\x00" + bytes(SIZE[0])))
    wrong[29] ^= 1  # of the header's checksum
    to.add("checksum.png", bytes(wrong))
    to.add("page.jpg", b"<!doctype html><title>404</title>")
    to.add("bomb.png", _png(30_000, 30_000, b""))
    to.add("float.tiff", to.values(np.float32))
    palette = to.label()
    palette.putpalette(range(12))
    to.add("palette_label.png", label=palette)
    to.add("rgb_label.png", label=to.picture())
    to.add("values.png", label=Image.fromarray(np.full(SIZE[::-1], 9, np.uint8)))
    to.add("other_size.png", label=to.label((47, 40)))
    to.add("float_label.png", label=b"")
    to.values(np.float32).save(folder / "labels" / "float_label.png", "TIFF")
    to.listed("missing.png", "values.png")
    to.add("lonely.png")
    (folder / "labels" / "lonely.png").unlink()
    to.add("unlabelled.png")
    to.lines[-1] = json.dumps({"fpath_img": "broken/images/unlabelled.png"})
    for a, b in (("loop_a.png", "loop_b.png"), ("loop_b.png", "loop_a.png")):
        (folder / "images" / a).symlink_to(folder / "images" / b)
    to.listed("loop_a.png", "values.png")
    to.listed(f"{'long' * 80}.png", "values.png")
    (folder / "images" / "folder.png").mkdir()
    to.listed("folder.png", "values.png")
    names = [_fault(json.loads(line)) for line in to.lines]
    to.lines += ["{bad", "[1]", '{"fpath_img": 7}', '{"fpath_img": "a\\u0000b.png"}']
    (root / "unusable.odgt").write_text("\n".join(to.lines))
    numbers = range(len(names) + 1, len(to.lines) + 1)
    return names + [f"line {number}:" for number in numbers]


def _fault(record: dict) -> str:
    """The file of a record that cannot be used: its label, where it has one of its own that is at fault."""
    name = record["fpath_img"]
    at_fault = ("_label.png", "values.png", "other_size.png", "lonely.png")
    return record["fpath_segm"] if name.endswith(at_fault) and "fpath_segm" in record else name


def write_unusual(root) -> list[str]:
    """Write `unusual.odgt`, a list of what can be used, but does not look like it, and the folder `odd`.

    Returns:
        The names of the pictures.
    """
    to = Writer(root, "odd")
    folder = to.folder
    to.add("one_pixel.png", size=(1, 1))
    to.add("label_of_16_bits.png", label=to.values(np.uint16))
    to.add("strip.png", size=(20_000, 2))
    to.add("sixteen_bit.png", Image.fromarray(to.rng.integers(0, 65536, SIZE[::-1], np.uint16)))
    to.add("cmyk.jpg", to.picture().convert("CMYK"))
    to.add("animated.gif", to.picture(), save_all=True, append_images=[to.picture()])
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = SIZE if orientation < 5 else SIZE[::-1]
        to.add(f"exif_{orientation}.jpg", to.picture(stored), exif=exif)
    to.add("späße_街.png")
    to.add(f"{'n' * 200}.png")
    to.add("checksum_of_data.png")
    path = folder / "images" / "checksum_of_data.png"
    content = bytearray(path.read_bytes())
    content[-13] ^= 1  # of the checksum of the pixels, which are whole
    path.write_bytes(bytes(content))
    to.add("absolute.png")
    to.lines[-1] = json.dumps(
        {"fpath_img": str(folder / "images" / "absolute.png"), "fpath_segm": "odd/labels/absolute.png"}
    )
    to.add("above.png")
    to.lines[-1] = json.dumps({"fpath_img": "odd/../odd/images/above.png", "fpath_segm": "odd/labels/above.png"})
    names = [json.loads(line)["fpath_img"] for line in to.lines]
    (root / "unusual.odgt").write_text("\r\n\r\n".join(to.lines) + "\r\n", encoding="utf-8", newline="")
    return names
