"""What there is of a segmented picture, and the files it can become."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..dataset import ClassTable
from ..lib.utils import TEXT, UserError, atomic_write
from .visualize import class_fractions, colorEncode, is_result, overlay, panel, result_stems, save_png

OPACITY = 0.55  # of the colours over a picture


@dataclass(frozen=True)
class Result:
    """A segmented picture.

    Attributes:
        path: of the picture, or what it is called.
        image: (H, W, 3) uint8 RGB.
        label_map: (H, W) int64 class indices.
        table: class names and colours.
        stem: path without extension of what `save` writes; None is the picture's name.
    """

    path: str
    image: np.ndarray
    label_map: np.ndarray
    table: ClassTable
    _look_again: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]] | None = field(default=None, repr=False)
    stem: Path | None = field(default=None, repr=False)

    @property
    def classes(self) -> list[dict]:
        """Classes with name (`class`), `index`, `share` of the pixels in 0..1 and `color`, largest first."""
        return class_fractions(self.label_map, self.table)

    def overlay(self, alpha: float = OPACITY, *, legend: bool = True) -> Image.Image:
        """The picture tinted with the colours of its classes, with a legend beside it.

        Args:
            alpha: weight of the colours, 0 (the picture) to 1 (the colours).
            legend: False leaves it out; the image then has the picture's size.

        Raises:
            ValueError: another weight.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha {alpha}: give the weight of the colours, 0 to 1")
        return overlay(self.image, self.label_map, self.table, alpha, legend=legend)

    def panel(self) -> Image.Image:
        """The picture and the colours of its classes side by side."""
        return panel([self.image, colorEncode(self.label_map, self.table.colors)])

    def probabilities(self, top: int = 5) -> tuple[np.ndarray, np.ndarray]:
        """The most probable classes of every pixel; the network looks at the picture once more for them.

        Args:
            top: how many, at most the number of classes.

        Returns:
            Class indices (top, H, W) int64 and their probabilities (top, H, W) float32, largest first.

        Raises:
            ValueError: another number, or this result does not know its network any more (it was sent elsewhere).
        """
        if not 1 <= top <= len(self.table):
            raise ValueError(f"top {top}: give 1 to {len(self.table)}, the number of classes")
        if self._look_again is None:
            raise ValueError("this result has no network to ask for probabilities")
        return self._look_again(self.image, top)

    def save(self, folder: str | Path, endings: Sequence[str] = (".png",)) -> list[Path]:
        """Write files into a folder, named after the picture; those of an earlier result of that name are replaced.

        Args:
            folder: is made if needed.
            endings: as of `save_as`.

        Returns:
            What was written.

        Raises:
            UserError: a file is there that is no result; nothing is written.
        """
        stem = self.stem or result_stems([Path(self.path).name or "picture"]).popitem()[1]
        return self.save_as(Path(folder, stem), endings)

    def save_as(self, stem: Path, endings: Sequence[str] = (".png",)) -> list[Path]:
        """Write `<stem><ending>` for every ending.

        Args:
            stem: path without extension.
            endings: of `.png` (the panel), `_overlay.png` (the tinted picture with a legend), `_index.png` (class
                indices as grey values, 8 bits, 16 above 256 classes), `_label.png` (the same with the label values of
                the data set, as evaluation servers read them) and `.json` (the classes with their shares).

        Raises:
            UserError: see `save`.
        """
        paths = [named(stem, ending) for ending in endings]
        refuse_overwriting(self.path, paths)
        for ending, path in zip(endings, paths, strict=True):
            if ending == ".json":
                self._save_shares(path)
            else:
                save_png(self.picture(ending), path)
        return paths

    def picture(self, ending: str) -> Image.Image:
        """The picture that `save_as` writes for an ending."""
        if ending == "_overlay.png":
            return self.overlay()
        if ending == "_index.png":
            return Image.fromarray(self.label_map.astype(np.uint8 if len(self.table) <= 256 else np.uint16))
        if ending == "_label.png":
            return Image.fromarray(self.table.decode(self.label_map))
        return self.panel()

    def _save_shares(self, path: Path) -> None:
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False), **TEXT)

    def as_dict(self) -> dict:
        """Plain values for a JSON file: the picture's name and size, its classes with their shares."""
        height, width = self.label_map.shape
        return {"image": self.path, "width": width, "height": height, "classes": self.classes}


def with_own_names(results: Sequence[Result]) -> list[Result]:
    """Results of which `save` writes none over another: with folders where the names of the pictures are the same."""
    names = [Path(result.path).name for result in results]
    if len(set(names)) < len({result.path for result in results}):
        names = [result.path for result in results]
    stems = result_stems(names)
    return [replace(result, stem=stems[name]) for result, name in zip(results, names, strict=True)]


def refuse_overwriting(picture: str, paths: Sequence[Path]) -> None:
    """Check that what is written for a picture takes the place of nothing but results.

    Raises:
        UserError: a file is there that is none.
    """
    for path in paths:
        if path.exists() and not (_is_shares(path) if path.suffix == ".json" else is_result(path)):
            raise UserError(
                f"the result of {picture} would be written over {path}, which is no result of an earlier run: "
                f"choose another folder"
            )


def _is_shares(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"image", "classes"} <= set(content)


def named(stem: Path, ending: str) -> Path:
    """The path of a result."""
    return stem.with_name(stem.name + ending)
