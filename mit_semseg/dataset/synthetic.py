"""Generate a dataset of synthetic scenes with exact labels, for the quick start and the tests.

    python -m mit_semseg.dataset.synthetic FOLDER [--train 120] [--val 20] [--size 320x240] [--seed 0]

Writes FOLDER/{training,validation}/{images,annotations} and FOLDER/classes.csv. Every image shows sky, grass, a road,
houses, trees and cars; most images show a sun. Light and noise are random.
"""

import argparse
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ..lib.utils import UserError, atomic_write, expand_path, prepare_streams

# Raw label values 1 to 7 are classes. 0 marks thin unlabelled borders between classes; PASCAL VOC has such borders.
CLASSES = ("sky", "grass", "road", "house", "tree", "car", "sun")
COLORS = ("#78b4e6", "#6eaa50", "#828282", "#be6450", "#1e6e3c", "#2850c8", "#fadc28")
SKY, GRASS, ROAD, HOUSE, TREE, CAR, SUN = range(1, 8)
SUPERSAMPLE = 2  # scenes are drawn this many times larger and then downsampled, to antialias edges


class _Scene:
    """An image and its label. Methods such as `car` draw an object in the image and in the label."""

    def __init__(self, rng: np.random.Generator, width: int, height: int):
        self.rng, self.width, self.height = rng, width * SUPERSAMPLE, height * SUPERSAMPLE
        self.image = Image.new("RGB", (self.width, self.height))
        self.label = Image.new("L", (self.width, self.height))
        self.image_draw, self.label_draw = ImageDraw.Draw(self.image), ImageDraw.Draw(self.label)
        self.horizon = int(self.height * rng.uniform(0.35, 0.6))
        self.background()

    def color(self, mean: tuple[int, int, int], spread: int = 22) -> tuple[int, ...]:
        return tuple(int(v) for v in np.clip(np.array(mean) + self.rng.integers(-spread, spread + 1, 3), 0, 255))

    def shape(self, kind: str, box, color, value: int) -> None:
        """Draw a rectangle, ellipse or polygon (`kind`) with `color` in the image and with `value` in the label."""
        getattr(self.image_draw, kind)(box, fill=self.color(color))
        getattr(self.label_draw, kind)(box, fill=value)

    def background(self) -> None:
        top, low = self.color((90, 150, 220), 40), self.color((190, 215, 240), 25)
        for y in range(self.horizon):
            color = tuple(int(a + (b - a) * (y / self.horizon)) for a, b in zip(top, low, strict=True))
            self.image_draw.line((0, y, self.width, y), color)
        self.label_draw.rectangle((0, 0, self.width, self.horizon), fill=SKY)
        self.shape("rectangle", (0, self.horizon, self.width, self.height), (95, 150, 70), GRASS)

    def sun(self) -> None:
        radius = int(self.height * self.rng.uniform(0.09, 0.13))
        x = int(self.rng.uniform(radius, self.width - radius))
        y = int(self.rng.uniform(radius, max(radius + 1, self.horizon * 0.45)))
        self.shape("ellipse", (x - radius, y - radius, x + radius, y + radius), (250, 225, 90), SUN)

    def road(self) -> None:
        far, near = self.rng.uniform(0.3, 0.7, 2) * self.width
        half_far, half_near = self.width * 0.03, self.width * self.rng.uniform(0.18, 0.3)
        corners = [(far - half_far, self.horizon), (far + half_far, self.horizon)]
        corners += [(near + half_near, self.height), (near - half_near, self.height)]
        self.shape("polygon", corners, (110, 110, 115), ROAD)
        self.road_line = (far, near)

    def house(self) -> None:
        width, height = self.width * self.rng.uniform(0.16, 0.26), self.height * self.rng.uniform(0.18, 0.28)
        left = self.rng.uniform(0, self.width - width)
        base = self.horizon + self.rng.uniform(0.02, 0.12) * self.height
        wall = [(200, 110, 90), (215, 190, 150), (180, 85, 70)][self.rng.integers(3)]
        self.shape("rectangle", (left, base - height, left + width, base), wall, HOUSE)
        roof = [(left - width * 0.08, base - height), (left + width * 1.08, base - height)]
        self.shape("polygon", [*roof, (left + width / 2, base - height * 1.55)], (120, 50, 45), HOUSE)
        for i in (0.2, 0.62):
            box = (left + width * i, base - height * 0.75, left + width * (i + 0.18), base - height * 0.4)
            self.shape("rectangle", box, (70, 80, 100), HOUSE)

    def tree(self) -> None:
        size = self.height * self.rng.uniform(0.26, 0.4)
        x = self.rng.uniform(0, self.width)
        base = self.horizon + self.rng.uniform(0.05, 0.3) * self.height
        self.shape("rectangle", (x - size * 0.07, base - size * 0.5, x + size * 0.07, base), (95, 65, 40), TREE)
        for _ in range(5):
            dx, dy = self.rng.uniform(-0.22, 0.22, 2) * size
            r = size * self.rng.uniform(0.24, 0.34)
            y = base - size * 0.75 + dy
            self.shape("ellipse", (x + dx - r, y - r, x + dx + r, y + r), (35, 95, 45), TREE)

    def car(self) -> None:
        t = self.rng.uniform(0.4, 0.85)
        far, near = self.road_line
        x, y = far + (near - far) * t, self.horizon + (self.height - self.horizon) * t
        width = self.width * (0.1 + 0.2 * t)
        body = [(40, 70, 200), (200, 40, 50), (235, 235, 235)][self.rng.integers(3)]
        self.shape("rectangle", (x - width / 2, y - width * 0.28, x + width / 2, y), body, CAR)
        self.shape("rectangle", (x - width * 0.3, y - width * 0.5, x + width * 0.3, y - width * 0.27), body, CAR)
        for side in (-0.3, 0.3):
            r, cx = width * 0.11, x + side * width
            self.shape("ellipse", (cx - r, y - r, cx + r, y + r), (30, 30, 30), CAR)

    def finish(self, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
        """Resize image and label to `size`. Add light and noise to the image, and unlabelled borders to the label."""
        image = self.image.resize(size, Image.Resampling.BILINEAR)
        label = self.label.resize(size, Image.Resampling.NEAREST)
        width, height = size
        coarse = Image.fromarray(self.rng.integers(96, 160, (height // 12 + 2, width // 12 + 2), np.uint8))
        light = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)[..., None] / 128
        pixels = np.asarray(image, np.float32) * light * self.rng.uniform(0.75, 1.15)
        pixels += self.rng.normal(0, 7, pixels.shape)
        edges = np.asarray(label.filter(ImageFilter.MaxFilter(3))) != np.asarray(label.filter(ImageFilter.MinFilter(3)))
        raw = np.where(edges, 0, np.asarray(label)).astype(np.uint8)
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), Image.fromarray(raw)


def make_scene(seed: tuple[int, ...], width: int = 320, height: int = 240) -> tuple[Image.Image, Image.Image]:
    """Return an RGB image and its label (mode L, values 0 to 7). Equal arguments give equal scenes."""
    rng = np.random.default_rng(seed)
    scene = _Scene(rng, width, height)
    if rng.random() < 0.7:
        scene.sun()
    for draw, most in ((scene.house, 2), (scene.tree, 3)):
        for _ in range(rng.integers(1, most + 1)):
            draw()
    scene.road()
    for _ in range(rng.integers(1, 3)):
        scene.car()
    return scene.finish((width, height))


def write_dataset(
    folder: str | Path, *, train: int = 120, val: int = 20, size: tuple[int, int] = (320, 240), seed: int = 0
) -> None:
    """Write a dataset of scenes with `size` (width, height). Every third scene has width and height swapped."""
    folder = Path(folder)
    for number, (split, count) in enumerate((("training", train), ("validation", val))):
        for i in range(count):
            width, height = size if i % 3 else size[::-1]
            image, label = make_scene((seed, number, i), width, height)
            with atomic_write(folder / split / "images" / f"scene_{i:04d}.jpg") as partial:
                image.save(partial, format="JPEG", quality=92)
            with atomic_write(folder / split / "annotations" / f"scene_{i:04d}.png") as partial:
                label.save(partial, format="PNG")
    with atomic_write(folder / "classes.csv") as partial:
        rows = [f"{i},{name},{color}" for i, (name, color) in enumerate(zip(CLASSES, COLORS, strict=True), start=1)]
        partial.write_text("\n".join(["raw,name,color", "0,,", *rows]) + "\n", encoding="utf-8")


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or min(map(int, match.groups())) < 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT with sides of at least 16 pixels, e.g. 320x240")
    return int(match[1]), int(match[2])


def main() -> None:
    """Parse the command line and write the dataset."""
    prepare_streams()
    parser = argparse.ArgumentParser("python -m mit_semseg.dataset.synthetic", description="Write synthetic scenes.")
    parser.add_argument("folder", metavar="FOLDER", type=expand_path, help="folder for images, labels and classes.csv")
    parser.add_argument("--train", type=int, default=120, metavar="N", help="training images (default %(default)s)")
    parser.add_argument("--val", type=int, default=20, metavar="N", help="validation images (default %(default)s)")
    parser.add_argument("--size", type=_parse_size, default="320x240", metavar="WxH", help="size (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the scenes (default %(default)s)")
    args = parser.parse_args()
    try:
        write_dataset(args.folder, train=args.train, val=args.val, size=args.size, seed=args.seed)
    except (OSError, UserError) as error:
        parser.error(str(error))
    print(f"{args.train} training and {args.val} validation images written to {args.folder}")


if __name__ == "__main__":
    main()
