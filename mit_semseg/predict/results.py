"""Results of segmentation, and the files they are saved to."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..dataset import ClassTable
from ..lib.utils import UTF8, UserError, atomic_write
from .visualize import OPACITY, class_fractions, colorEncode, overlay, panel

SUFFIXES = (".png", "_overlay.png", "_index.png", "_label.png", ".json")  # see `Result.save_as`
SOFTWARE = "mit_semseg"  # PNG tag that identifies results
PNG_LEVEL = 1  # half the time of Pillow's default 6, files a tenth larger


@dataclass(frozen=True)
class Result:
    """A segmented image.

    Attributes:
        path: path or name of the image.
        image: (H, W, 3) uint8 RGB.
        label_map: (H, W) int64 class indices.
        table: class names and colors.
        stem: relative path without suffix that `save` writes to; None uses the name of the image.
    """

    path: str
    image: np.ndarray
    label_map: np.ndarray
    table: ClassTable
    _top_classes: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]] | None = field(default=None, repr=False)
    stem: Path | None = field(default=None, repr=False)

    @property
    def classes(self) -> list[dict]:
        """Classes in the image, largest first; see `class_fractions`."""
        return class_fractions(self.label_map, self.table)

    def overlay(self, alpha: float = OPACITY, *, legend: bool = True) -> Image.Image:
        """Blend the image with the class colors.

        Args:
            alpha: weight of the colors, 0..1.
            legend: add a legend to the right of the image.

        Raises:
            ValueError: `alpha` is not in 0..1.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in 0..1, got {alpha}")
        return overlay(self.image, self.label_map, self.table, alpha, legend=legend)

    def panel(self) -> Image.Image:
        """Draw the image and the colored label map side by side."""
        return panel([self.image, colorEncode(self.label_map, self.table.colors)])

    def probabilities(self, top: int = 5) -> tuple[np.ndarray, np.ndarray]:
        """Return the `top` most probable classes of every pixel; runs the network again.

        Returns:
            Class indices (top, H, W) int64 and probabilities (top, H, W) float32, largest first.

        Raises:
            ValueError: `top` is not in 1..number of classes, or the result was not made by a `Segmenter`.
        """
        if not 1 <= top <= len(self.table):
            raise ValueError(f"top must be in 1..{len(self.table)} (number of classes), got {top}")
        if self._top_classes is None:
            raise ValueError("this result has no network; probabilities need a result of a Segmenter")
        return self._top_classes(self.image, top)

    def save(self, folder: str | Path, suffixes: Sequence[str] = (".png",)) -> list[Path]:
        """Save files named after the image to a folder; see `save_as`."""
        stem = self.stem or unique_stems([Path(self.path).name or "image"]).popitem()[1]
        return self.save_as(Path(folder, stem), suffixes)

    def save_as(self, stem: Path, suffixes: Sequence[str] = (".png",)) -> list[Path]:
        """Save `<stem><suffix>` for every suffix and return the paths. Results of an earlier run are overwritten.

        Args:
            stem: path without suffix.
            suffixes: `.png` (panel), `_overlay.png` (overlay with legend), `_index.png` (class indices as 8-bit gray,
                16-bit above 256 classes), `_label.png` (the raw label values of the dataset, as evaluation servers
                expect) or `.json` (see `as_dict`).

        Raises:
            UserError: a file exists that is not a result; nothing is written.
        """
        paths = [add_suffix(stem, suffix) for suffix in suffixes]
        check_overwriting(self.path, paths)
        for suffix, path in zip(suffixes, paths, strict=True):
            if suffix == ".json":
                with atomic_write(path) as partial:
                    partial.write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False), **UTF8)
            else:
                save_png(self.render(suffix), path)
        return paths

    def render(self, suffix: str) -> Image.Image:
        """Render the image that `save_as` writes for a suffix."""
        if suffix == "_overlay.png":
            return self.overlay()
        if suffix == "_index.png":
            return Image.fromarray(self.label_map.astype(np.uint8 if len(self.table) <= 256 else np.uint16))
        if suffix == "_label.png":
            return Image.fromarray(self.table.decode(self.label_map))
        return self.panel()

    def as_dict(self) -> dict:
        """Return `image` (path), `width`, `height` and `classes` for a JSON file."""
        height, width = self.label_map.shape
        return {"image": self.path, "width": width, "height": height, "classes": self.classes}


def with_unique_stems(results: Sequence[Result]) -> list[Result]:
    """Set the stems of results so that `save` writes no file twice; equal file names keep their folders."""
    names = [Path(result.path).name for result in results]
    if len(set(names)) < len({result.path for result in results}):
        names = [result.path for result in results]
    stems = unique_stems(names)
    return [replace(result, stem=stems[name]) for result, name in zip(results, names, strict=True)]


def unique_stems(names: Sequence[str]) -> dict[str, Path]:
    """Return a path without suffix for every image so that no two results share a file name.

    The extension is dropped if it is not needed: `a.jpg` gives `a`, but `b.jpg` and `b.png` give `b.jpg` and `b.png`.
    Folders are kept, `..` is replaced by `_parent`. File names that differ only in case count as equal, as on Windows
    and macOS.
    """
    paths = {name: _relative_path(Path(name)) for name in names}
    uses = Counter(str(path.with_suffix("")).casefold() for path in paths.values())
    stems, taken = {}, set()
    for name, path in paths.items():
        short = path.with_suffix("")
        preferred = [short, path] if uses[str(short).casefold()] == 1 else [path]
        for stem in chain(preferred, (path.with_name(f"{path.name}_{number}") for number in count(2))):
            files = {f"{stem}{suffix}".casefold() for suffix in SUFFIXES}
            if not files & taken:
                break
        stems[name] = stem
        taken |= files
    return stems


def _relative_path(path: Path) -> Path:
    parts = path.parts[1:] if path.is_absolute() else path.parts
    return Path(*("_parent" if part == ".." else part for part in parts))


def add_suffix(stem: Path, suffix: str) -> Path:
    """Append a suffix to the file name; `Path.with_suffix` would replace an extension in it."""
    return stem.with_name(stem.name + suffix)


def save_png(image: Image.Image, path: Path) -> None:
    """Save a PNG atomically, tagged as a result (see `is_result`)."""
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    with atomic_write(path) as partial:
        image.save(partial, format="PNG", pnginfo=info, compress_level=PNG_LEVEL)


def check_overwriting(image: str, paths: Sequence[Path]) -> None:
    """Raise a `UserError` if an output path of an image exists and is not a result."""
    for path in paths:
        if path.exists() and not is_result(path):
            raise UserError(f"the result of {image} would overwrite {path}, which is not a result; use another folder")


def is_result(path: Path) -> bool:
    """Return whether a file was written by `save_png` or is a JSON file of `Result.save_as`."""
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            return isinstance(content, dict) and {"image", "classes"} <= content.keys()
        with Image.open(path) as image:
            return image.format == "PNG" and image.info.get("Software") == SOFTWARE
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
