"""Every picture the toolkit draws: colour maps, panels, overlays with a legend, curves."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..dataset import ClassTable
from ..lib.utils import atomic_write

GAP = 6  # pixels between the parts of a panel
ENDINGS = (".png", "_overlay.png", "_index.png", "_label.png", ".json")  # what may be written for a picture
SOFTWARE = "mit_semseg"
PNG_LEVEL = 1  # of 9: half the time of Pillow's 6, for files that are a tenth larger


def colorEncode(labelmap: np.ndarray, colors: np.ndarray, mode: str = "RGB") -> np.ndarray:
    """Colour picture of a label map.

    Args:
        labelmap: (H, W) integers; negative ones (ignored) become black.
        colors: (num_class, 3) uint8.
        mode: 'RGB' or 'BGR' order of the channels.

    Returns:
        (H, W, 3) uint8.

    Raises:
        IndexError: a class that has no colour.
        ValueError: another mode.
    """
    if mode not in ("RGB", "BGR"):
        raise ValueError(f"mode {mode!r}: choose RGB or BGR")
    if labelmap.size and labelmap.max() >= len(colors):
        raise IndexError(f"class {labelmap.max()} has no colour: there are {len(colors)}")
    table = np.concatenate([np.asarray(colors, np.uint8), np.zeros((1, 3), np.uint8)])
    picture = table[np.where(labelmap < 0, len(colors), labelmap)]
    return picture[..., ::-1] if mode == "BGR" else picture


def panel(pictures: Sequence[np.ndarray]) -> Image.Image:
    """Pictures (H, W, 3) uint8 of equal height side by side, with a white gap."""
    height = max(picture.shape[0] for picture in pictures)
    gap = np.full((height, GAP, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (gap, picture)][1:]
    return Image.fromarray(np.concatenate(parts, axis=1))


def overlay(
    image: np.ndarray, label_map: np.ndarray, table: ClassTable, alpha: float = 0.55, *, legend: bool = True
) -> Image.Image:
    """The picture tinted with the class colours, and a legend of its classes beside it.

    Args:
        image: (H, W, 3) uint8.
        label_map: (H, W) class indices.
        table: names and colours.
        alpha: weight of the colours, 0..1.
        legend: False leaves it out.
    """
    colored = colorEncode(label_map, table.colors)
    tinted = Image.blend(Image.fromarray(image), Image.fromarray(colored), alpha)
    if not legend:
        return tinted
    names = _legend(label_map, table, tinted.height)
    sheet = Image.new("RGB", (tinted.width + GAP + names.width, max(tinted.height, names.height)), "white")
    sheet.paste(tinted, (0, 0))
    sheet.paste(names, (tinted.width + GAP, 0))
    return sheet


def _legend(label_map: np.ndarray, table: ClassTable, height: int) -> Image.Image:
    """Swatches, names and shares of the classes of a label map, largest first, as many columns as needed."""
    entries = class_fractions(label_map, table)
    size = max(11, min(20, height // 24))
    font, row = ImageFont.load_default(size), round(size * 1.6)
    texts = [f"{table.labels[entry['index']]}  {entry['share'] * 100:.1f} %" for entry in entries]
    width = round(row * 1.5 + max((font.getlength(text) for text in texts), default=0)) + GAP
    rows = max(1, height // row)
    columns = max(1, -(-len(entries) // rows))
    legend = Image.new("RGB", (columns * width, max(height, row)), "white")
    draw = ImageDraw.Draw(legend)
    for i, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        x, y = i // rows * width, i % rows * row
        color = tuple(int(v) for v in entry["color"])
        draw.rectangle((x + 2, y + 3, x + row - 2, y + row - 3), fill=color, outline="black")
        draw.text((x + row + 4, y + row // 2), text, fill="black", font=font, anchor="lm")
    return legend


def class_fractions(label_map: np.ndarray, table: ClassTable) -> list[dict]:
    """Classes of a label map, largest share first.

    Returns:
        A dict each: `class` (name), `index`, `share` of all pixels in 0..1, `color` [r, g, b].
    """
    counts = np.bincount(label_map[label_map >= 0].ravel(), minlength=len(table))
    order = sorted(np.flatnonzero(counts), key=lambda i: -counts[i])
    return [
        {
            "class": table.names[i],
            "index": int(i),
            "share": float(counts[i] / label_map.size),
            "color": [int(v) for v in table.colors[i]],
        }
        for i in order
    ]


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG that says who made it (see `is_result`); it appears whole or not at all."""
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    with atomic_write(path) as partial:
        picture.save(partial, format="PNG", pnginfo=info, compress_level=PNG_LEVEL)


def is_result(path: Path) -> bool:
    """Whether a file is a picture that `save_png` wrote."""
    try:
        with Image.open(path) as image:
            return image.format == "PNG" and image.info.get("Software") == SOFTWARE
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def result_stems(names: Sequence[str]) -> dict[str, Path]:
    """For every picture a path without extension for its results, such that no two results have the same name.

    The extension is dropped where that is safe, else kept: a.jpg and a.png give `a.jpg` and `a.png`, to which endings
    are added. Folders are kept; `..` becomes a plain name.
    """
    full = {name: Path(*(part if part != ".." else "_parent" for part in _inside(Path(name)))) for name in names}

    def results(stem: Path) -> set[str]:
        """What disks would call them that take a.png and A.png for one (those of Windows and macOS)."""
        return {f"{stem}{ending}".casefold() for ending in ENDINGS}

    claims = Counter(result for path in full.values() for result in results(path.with_suffix("")))
    whole = {result for path in full.values() if path.suffix for result in results(path)}

    def is_safe(stem: Path) -> bool:
        return all(claims[result] == 1 and result not in whole for result in results(stem))

    def candidates(path: Path) -> Iterator[Path]:
        if is_safe(path.with_suffix("")):
            yield path.with_suffix("")
        yield path
        for number in count(2):
            yield path.with_name(f"{path.name}_{number}")

    stems, taken = {}, set()
    for name, path in full.items():
        stems[name] = next(stem for stem in candidates(path) if not results(stem) & taken)
        taken |= results(stems[name])
    return stems


def _inside(path: Path) -> tuple[str, ...]:
    return path.parts[1:] if path.is_absolute() else path.parts


def result_panel(item: dict, prediction: np.ndarray, table: ClassTable) -> Image.Image:
    """The panel [image | annotation | prediction] of a validation item.

    Args:
        item: of a `ValDataset`.
        prediction: (H, W) class indices.
        table: class colours.
    """
    parts = (item["seg_label"][0].numpy(), prediction)
    return panel([item["img_ori"], *(colorEncode(part, table.colors) for part in parts)])
