"""Draw label maps: class colors, panels, and overlays with a legend."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..dataset import ClassTable
from ..lib import opencv as cv2

GAP = 6  # pixels between the parts of a panel
OPACITY = 0.55  # weight of the class colors in overlays


def colorEncode(labelmap: np.ndarray, colors: np.ndarray, mode: str = "RGB") -> np.ndarray:
    """Convert a label map to a color image (H, W, 3) uint8.

    Args:
        labelmap: (H, W) class indices. Pixels with a negative index (ignored) become black.
        colors: (num_class, 3) uint8.
        mode: channel order, 'RGB' or 'BGR'.

    Raises:
        IndexError: a class index is num_class or larger.
    """
    if mode not in ("RGB", "BGR"):
        raise ValueError(f"mode must be RGB or BGR, got {mode!r}")
    if labelmap.size and labelmap.max() >= len(colors):
        raise IndexError(f"class index {labelmap.max()} has no color; `colors` has {len(colors)} rows")
    table = np.concatenate([np.asarray(colors, np.uint8), np.zeros((1, 3), np.uint8)])
    image = table[np.where(labelmap < 0, len(colors), labelmap)]
    return image[..., ::-1] if mode == "BGR" else image


def panel(images: Sequence[np.ndarray]) -> Image.Image:
    """Join images (H, W, 3) uint8 of equal height side by side, with white gaps between them."""
    gap = np.full((images[0].shape[0], GAP, 3), 255, np.uint8)
    return Image.fromarray(np.concatenate([part for image in images for part in (gap, image)][1:], axis=1))


def result_panel(item: dict, prediction: np.ndarray, table: ClassTable, more: Sequence[np.ndarray] = ()) -> Image.Image:
    """Draw a panel [image | label | prediction] of a `ValDataset` item.

    `prediction` contains class indices (H, W); `more` are images (H, W, 3) uint8 to the right of the prediction.
    """
    maps = item["seg_label"][0].numpy(), prediction
    return panel([item["img_ori"], *(colorEncode(label_map, table.colors) for label_map in maps), *more])


def overlay(
    image: np.ndarray, label_map: np.ndarray, table: ClassTable, alpha: float = OPACITY, *, legend: bool = True
) -> Image.Image:
    """Blend an image (H, W, 3) uint8 with the colors of its label map (H, W); see `Result.overlay`."""
    blended = Image.blend(Image.fromarray(image), Image.fromarray(colorEncode(label_map, table.colors)), alpha)
    if not legend:
        return blended
    key = _legend(label_map, table, blended.height)
    canvas = Image.new("RGB", (blended.width + GAP + key.width, max(blended.height, key.height)), "white")
    canvas.paste(blended, (0, 0))
    canvas.paste(key, (blended.width + GAP, 0))
    return canvas


def draw_confidence(confidence: np.ndarray) -> Image.Image:
    """Draw confidences (H, W) in 0..1 with a color scale: dark is uncertain, yellow is certain."""
    height, size = confidence.shape[0], max(11, min(20, confidence.shape[0] // 24))
    scale = np.repeat(np.linspace(1, 0, height)[:, None], size, axis=1)
    bar, image = (Image.fromarray(_viridis(values)) for values in (scale, confidence))
    font, texts = ImageFont.load_default(size), ("100 %", "50 %", "0 %")
    canvas = Image.new(
        "RGB", (image.width + 3 * GAP + bar.width + round(max(map(font.getlength, texts))), height), "white"
    )
    canvas.paste(image, (0, 0))
    canvas.paste(bar, (image.width + GAP, 0))
    for text, y, anchor in zip(texts, (0, height // 2, height), ("la", "lm", "ld"), strict=True):
        ImageDraw.Draw(canvas).text(
            (image.width + 2 * GAP + bar.width, y), text, fill="black", font=font, anchor=anchor
        )
    return canvas


def draw_doubt(image: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Draw where the label of an image (H, W, 3) uint8 looks wrong; return (H, W, 3) uint8.

    `given` (h, w) is the probability of the label, NaN where the label is ignored. The image becomes gray; pixels
    with a low probability become red.
    """
    size = image.shape[1::-1]
    doubt = Image.fromarray(np.nan_to_num(1 - given).astype(np.float32)).resize(size, Image.Resampling.NEAREST)
    gray = np.asarray(Image.fromarray(image).convert("L").convert("RGB"), np.float32) * 0.5
    weight = np.asarray(doubt)[..., None]
    return (gray + weight * (np.array([255, 32, 32], np.float32) - gray)).astype(np.uint8)


def _viridis(values: np.ndarray) -> np.ndarray:
    """Convert values (H, W) in 0..1 to colors (H, W, 3) uint8."""
    gray = np.rint(np.asarray(values) * 255).astype(np.uint8)
    return np.ascontiguousarray(cv2.applyColorMap(gray, cv2.COLORMAP_VIRIDIS)[..., ::-1])


def _legend(label_map: np.ndarray, table: ClassTable, height: int) -> Image.Image:
    """Return an image with color, name and fraction of every class in `label_map`, in descending order."""
    entries = class_fractions(label_map, table)
    size = max(11, min(20, height // 24))
    font, row = ImageFont.load_default(size), round(size * 1.6)
    texts = [f"{table.labels[entry['index']]}  {entry['fraction'] * 100:.1f} %" for entry in entries]
    width = round(row * 1.5 + max((font.getlength(text) for text in texts), default=0)) + GAP
    rows = max(1, height // row)
    columns = max(1, -(-len(entries) // rows))
    legend = Image.new("RGB", (columns * width, max(height, row)), "white")
    draw = ImageDraw.Draw(legend)
    for i, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        x, y = i // rows * width, i % rows * row
        draw.rectangle((x + 2, y + 3, x + row - 2, y + row - 3), fill=tuple(entry["color"]), outline="black")
        draw.text((x + row + 4, y + row // 2), text, fill="black", font=font, anchor="lm")
    return legend


def class_fractions(label_map: np.ndarray, table: ClassTable) -> list[dict]:
    """Return a dict for every class in a label map, in descending order of the fraction.

    The keys are `class` (name), `index`, `fraction` (of all pixels) and `color` ([r, g, b]).
    """
    counts = np.bincount(label_map[label_map >= 0].ravel(), minlength=len(table))
    return [
        {
            "class": table.names[i],
            "index": int(i),
            "fraction": float(counts[i] / label_map.size),
            "color": table.colors[i].tolist(),
        }
        for i in sorted(np.flatnonzero(counts), key=lambda i: -counts[i])
    ]
