"""Write a dataset of damaged files, and a dataset of valid files in unusual formats."""

import json
import struct
import zlib

import numpy as np
from PIL import Image

SIZE = (48, 40)


def _gray_png(width: int, height: int, data: bytes) -> bytes:
    """Return a gray PNG file with this size in its header; `data` (rows before compression) may have another size."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    for name, part in ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")):
        content += struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
    return content


class DatasetWriter:
    """Writes images, and labels with three classes, to the folder `root / name`; collects the lines of a list."""

    def __init__(self, root, name: str):
        self.name, self.rng, self.lines = name, np.random.default_rng(0), []
        self.folder = root / name
        for part in ("images", "labels"):
            (self.folder / part).mkdir(parents=True)

    def image(self, size=SIZE) -> Image.Image:
        return Image.fromarray(self.rng.integers(0, 256, (size[1], size[0], 3), np.uint8))

    def label(self, size=SIZE, dtype=np.uint8) -> Image.Image:
        return Image.fromarray(self.rng.integers(0, 4, (size[1], size[0]), np.uint8).astype(dtype))

    def add(self, name: str, image=None, label=None, *, size=SIZE, **save_options) -> None:
        """Write an image and a label (Pillow images or bytes; None: random pixels), and add them to the list."""
        image = self.image(size) if image is None else image
        label = self.label(size) if label is None else label
        label_name = f"{name.rpartition('.')[0]}.png"
        for path, content, options in (
            (self.folder / "images" / name, image, save_options),
            (self.folder / "labels" / label_name, label, {}),
        ):
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content.save(path, **options)
        self.add_line(name, label_name)

    def add_line(self, image: str, label: str) -> None:
        record = {"fpath_img": f"{self.name}/images/{image}", "fpath_segm": f"{self.name}/labels/{label}"}
        self.lines.append(json.dumps(record))


def write_unusable(root) -> list[str]:
    """Write unusable pairs and their list unusable.odgt. Return the text that each error must contain."""
    writer = DatasetWriter(root, "broken")
    images, labels = writer.folder / "images", writer.folder / "labels"
    writer.add("truncated.jpg", size=(200, 160))
    (images / "truncated.jpg").write_bytes((images / "truncated.jpg").read_bytes()[:2000])
    writer.add("zero_bytes.png", b"")
    wrong_checksum = bytearray(_gray_png(*SIZE, b"\x00" + bytes(SIZE[0])))
    wrong_checksum[29] ^= 1  # flip a bit in the header's checksum
    writer.add("checksum.png", bytes(wrong_checksum))
    writer.add("page.jpg", b"<!doctype html><title>404</title>")
    writer.add("bomb.png", _gray_png(30_000, 30_000, b""))
    writer.add("float.tiff", writer.label(dtype=np.float32))
    palette = writer.label()
    palette.putpalette(range(12))
    writer.add("palette_label.png", label=palette)
    writer.add("rgb_label.png", label=writer.image())
    writer.add("values.png", label=Image.fromarray(np.full(SIZE[::-1], 9, np.uint8)))
    writer.add("other_size.png", label=writer.label((47, 40)))
    writer.add("float_label.png", label=b"")
    writer.label(dtype=np.float32).save(labels / "float_label.png", "TIFF")
    writer.add_line("missing.png", "values.png")
    writer.add("lonely.png")
    (labels / "lonely.png").unlink()
    writer.add("unlabelled.png")
    writer.lines[-1] = json.dumps({"fpath_img": "broken/images/unlabelled.png"})
    for name, target in (("loop_a.png", "loop_b.png"), ("loop_b.png", "loop_a.png")):
        (images / name).symlink_to(images / target)
    writer.add_line("loop_a.png", "values.png")
    writer.add_line(f"{'long' * 80}.png", "values.png")
    (images / "folder.png").mkdir()
    writer.add_line("folder.png", "values.png")
    expected = [json.loads(line) for line in writer.lines]
    bad_labels = ("_label.png", "values.png", "other_size.png", "lonely.png")
    expected = [r["fpath_segm" if r["fpath_img"].endswith(bad_labels) else "fpath_img"] for r in expected]
    invalid = ["{bad", "[1]", '{"fpath_img": 7}', '{"fpath_img": "a\\u0000b.png"}']
    (root / "unusable.odgt").write_text("\n".join([*writer.lines, *invalid]))
    return expected + [f"line {len(expected) + 1 + i}:" for i in range(len(invalid))]


def write_unusual(root) -> list[str]:
    """Write unusual but valid pairs and their list unusual.odgt. Return the image paths."""
    writer = DatasetWriter(root, "odd")
    images = writer.folder / "images"
    writer.add("one_pixel.png", size=(1, 1))
    writer.add("label_of_16_bits.png", label=writer.label(dtype=np.uint16))
    writer.add("strip.png", size=(20_000, 2))
    writer.add("sixteen_bit.png", Image.fromarray(writer.rng.integers(0, 65536, SIZE[::-1], np.uint16)))
    writer.add("cmyk.jpg", writer.image().convert("CMYK"))
    writer.add("animated.gif", writer.image(), save_all=True, append_images=[writer.image()])
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        writer.add(f"exif_{orientation}.jpg", writer.image(SIZE if orientation < 5 else SIZE[::-1]), exif=exif)
    writer.add("späße_街.png")
    writer.add(f"{'n' * 200}.png")
    writer.add("checksum_of_data.png")
    content = bytearray((images / "checksum_of_data.png").read_bytes())
    content[-13] ^= 1  # flip a bit in the checksum of the pixels
    (images / "checksum_of_data.png").write_bytes(bytes(content))
    for name, folder in (("absolute.png", str(images)), ("above.png", "odd/../odd/images")):
        writer.add(name)
        writer.lines[-1] = json.dumps({"fpath_img": f"{folder}/{name}", "fpath_segm": f"odd/labels/{name}"})
    (root / "unusual.odgt").write_text("\r\n\r\n".join(writer.lines) + "\r\n", encoding="utf-8", newline="")
    return [json.loads(line)["fpath_img"] for line in writer.lines]
