"""Segmentation results, and the files to which they are saved."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..dataset import ClassTable
from ..dataset.classes import IGNORE
from ..dataset.rasters import SOFTWARE, is_tiff, raster_software
from ..lib.utils import UTF8, UserError, atomic_write
from .visualize import OPACITY, class_fractions, colorEncode, draw_confidence, overlay, panel

# Suffixes of output files (see `Result.save_as`), each with the name of the test.py argument that selects it.
SUFFIXES = {
    ".png": "panel",
    "_overlay.png": "overlay",
    "_index.png": "index",
    "_label.png": "labels",
    "_confidence.png": "confidence",
    "_confidence_color.png": "confidence",
    ".json": "json",
}
# Suffixes of images that are segmented window by window, see `raster.segment_raster`
RASTER_SUFFIXES = {
    "_index.png": "_index.tif",
    "_label.png": "_label.tif",
    "_confidence.png": "_confidence.tif",
}
PNG_LEVEL = 1  # compression level; compared with Pillow's default 6, half the time and 10 % larger files


@dataclass(frozen=True)
class Result:
    """A segmented image."""

    path: str  # path of the image; a name for an image without path
    image: np.ndarray  # (H, W, 3) uint8 RGB
    label_map: np.ndarray  # (H, W) int64 class indices
    table: ClassTable  # class names and colors
    _top_classes: Callable[[int], tuple[np.ndarray, np.ndarray]] = field(repr=False)
    stem: Path | None = field(default=None, repr=False)  # relative output path without suffix for `save`, or None
    _confidence: np.ndarray | None = field(default=None, repr=False)  # None: `confidence` runs the network again

    @property
    def classes(self) -> list[dict]:
        """Classes in the image, in descending order of size; see `class_fractions`."""
        return class_fractions(self.label_map, self.table)

    def overlay(self, alpha: float = OPACITY, *, legend: bool = True) -> Image.Image:
        """Blend the image with the class colors (weight `alpha`, 0..1); `legend` adds a legend on the right."""
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in 0..1, got {alpha}")
        return overlay(self.image, self.label_map, self.table, alpha, legend=legend)

    def panel(self) -> Image.Image:
        """Return a panel with the image and the colored label map side by side."""
        return panel([self.image, colorEncode(self.label_map, self.table.colors)])

    def probabilities(self, top: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Run the network again, and return the `top` most probable classes of every pixel (default: at most 5).

        Returns:
            Class indices (top, H, W) int64 and probabilities (top, H, W) float32, from most to least probable.
        """
        top = min(5, len(self.table)) if top is None else top
        if not 1 <= top <= len(self.table):
            raise ValueError(f"top must be in 1..{len(self.table)} (number of classes), got {top}")
        return self._top_classes(top)

    @cached_property
    def confidence(self) -> np.ndarray:
        """(H, W) float32, the largest class probability of every pixel. The first access runs the network again."""
        return self._top_classes(1)[1][0] if self._confidence is None else self._confidence

    def label_values(self, min_confidence: float = 0.0) -> np.ndarray:
        """Return the raw label values (H, W) of the dataset, uint8 or uint16.

        Pixels whose confidence is below `min_confidence` get the ignored value of the class table.

        Raises:
            UserError: `min_confidence` is not 0, and the class table has no ignored value.
        """
        if not min_confidence:
            return self.table.decode(self.label_map)
        check_ignored_value(self.table)
        return self.table.decode(np.where(self.confidence < min_confidence, IGNORE, self.label_map))

    def save(self, folder: str | Path, suffixes: Sequence[str] = (".png",)) -> list[Path]:
        """Save output files, which are named after the image, to a folder and return their paths; see `save_as`."""
        stem = self.stem or unique_stems([Path(self.path).name or "image"]).popitem()[1]
        return self.save_as(Path(folder, stem), suffixes)

    def save_as(self, stem: Path, suffixes: Sequence[str], *, min_confidence: float = 0.0) -> list[Path]:
        """Save one file `<stem><suffix>` for every suffix, and return the paths of these files.

        Args:
            stem: path without suffix.
            suffixes: `.png` (panel), `_overlay.png` (overlay with legend), `_index.png` (class indices as 8-bit gray,
                or 16-bit for more than 256 classes), `_label.png` (see `label_values`), `_confidence.png` (8-bit gray,
                255 is a confidence of 1), `_confidence_color.png` (colors, with a scale) or `.json` (see `as_dict`).
            min_confidence: argument of `label_values`.

        Raises:
            UserError: a file with one of these paths exists and was not written by this program.
            ValueError: a suffix is unknown.
        """
        if unknown := [suffix for suffix in suffixes if suffix not in SUFFIXES]:
            raise ValueError(f"unknown suffix {unknown[0]!r}; choose from {', '.join(SUFFIXES)}")
        paths = [Path(f"{stem}{suffix}") for suffix in suffixes]
        check_overwriting(self.path, paths)
        for suffix, path in zip(suffixes, paths, strict=True):
            if suffix == ".json":
                with atomic_write(path) as partial:
                    partial.write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False), **UTF8)
            else:
                save_png(self.render(suffix, min_confidence), path)
        return paths

    def render(self, suffix: str, min_confidence: float = 0.0) -> Image.Image:
        """Return the image that `save_as` writes for a suffix."""
        if suffix == "_overlay.png":
            return self.overlay()
        if suffix == "_index.png":
            return Image.fromarray(self.label_map.astype(np.uint8 if len(self.table) <= 256 else np.uint16))
        if suffix == "_label.png":
            return Image.fromarray(self.label_values(min_confidence))
        if suffix == "_confidence.png":
            return Image.fromarray(np.rint(self.confidence * 255).astype(np.uint8))
        if suffix == "_confidence_color.png":
            return draw_confidence(self.confidence)
        return self.panel()

    def as_dict(self) -> dict:
        """Return the content of the JSON file: `image` (path), `width`, `height` and `classes`."""
        height, width = self.label_map.shape
        return {"image": self.path, "width": width, "height": height, "classes": self.classes}


def check_ignored_value(table: ClassTable) -> None:
    """Raise a `UserError` if the class table has no ignored label value."""
    if table.ignored_value is None:
        raise UserError(
            "a minimum confidence needs an ignored label value; set DATASET.ignore_values, e.g. [255], or add a row "
            "without a name to the CSV file in DATASET.classes"
        )


def raster_suffixes(suffixes: Sequence[str]) -> list[str]:
    """Return the suffixes of the results of a large image, which has neither a panel nor an overlay."""
    chosen = [RASTER_SUFFIXES[suffix] for suffix in suffixes if suffix in RASTER_SUFFIXES]
    return chosen or [RASTER_SUFFIXES["_index.png"]]


def with_unique_stems(results: Sequence[Result]) -> list[Result]:
    """Return the results with unique stems for `save`. If two file names are equal, all stems contain folders."""
    names = [Path(result.path).name for result in results]
    if len(set(names)) < len({result.path for result in results}):
        names = [result.path for result in results]
    stems = unique_stems(names)
    return [replace(result, stem=stems[name]) for result, name in zip(results, names, strict=True)]


def unique_stems(names: Sequence[str]) -> dict[str, Path]:
    """Return a dict from image names to stems (output paths without suffix). No output file belongs to two images.

    The stem of `a.jpg` is `a`. If there are `b.jpg` and `b.png`, their stems are `b.jpg` and `b.png`. Folders are kept,
    and `..` is replaced by `_parent`. File names that differ only in case count as equal, as on Windows and macOS.
    """
    paths = {}
    for name in names:
        parts = Path(name).relative_to(Path(name).anchor).parts
        paths[name] = Path(*("_parent" if part == ".." else part for part in parts))
    uses = Counter(str(path.with_suffix("")).casefold() for path in paths.values())
    stems, taken = {}, set()
    for name, path in paths.items():
        short = path.with_suffix("")
        preferred = [short, path] if uses[str(short).casefold()] == 1 else [path]
        for stem in chain(preferred, (path.with_name(f"{path.name}_{number}") for number in count(2))):
            files = {f"{stem}{suffix}".casefold() for suffix in (*SUFFIXES, *RASTER_SUFFIXES.values())}
            if not files & taken:
                stems[name] = stem
                taken |= files
                break
    return stems


def save_png(image: Image.Image, path: Path) -> None:
    """Save a PNG file atomically, with the tag that `is_output_file` reads."""
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    with atomic_write(path) as partial:
        image.save(partial, format="PNG", pnginfo=info, compress_level=PNG_LEVEL)


def check_overwriting(image: str, paths: Sequence[Path]) -> None:
    """Raise a `UserError` if an output file of an image exists and was not written by this program."""
    for path in paths:
        if path.exists() and not is_output_file(path):
            raise UserError(
                f"the output for {image} would overwrite {path}, which was not written by this program; use another "
                f"output folder"
            )


def is_output_file(path: Path) -> bool:
    """Return whether a file was written by `save_png`, `Result.save_as` or `segment_raster`."""
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            return isinstance(content, dict) and {"image", "classes"} <= content.keys()
        if is_tiff(path):
            return find_spec("rasterio") is not None and raster_software(path) == SOFTWARE
        with Image.open(path) as image:
            return image.format == "PNG" and image.info.get("Software") == SOFTWARE
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
