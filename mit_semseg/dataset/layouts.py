"""How data sets lie on disk: twin folders of images and labels, and the split lists of PASCAL VOC."""

import fnmatch
import os
import unicodedata
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..lib.utils import UserError, progress_bar, shorten
from .image_io import ImageFileError, image_size

Record = dict  # fpath_img, fpath_segm (absent for pictures without annotation), width, height


class ListError(UserError, ValueError):
    """A list of images that cannot be used; the message names file and line."""


@dataclass(frozen=True)
class Layout:
    """How the files of a data set lie: twin folders, and what the stems of a pair end with.

    Attributes:
        images, annotations: names of the twin folders.
        image_ending: of an image's stem.
        label_endings: of a label's stem, preferred first; labels that end with none of them belong to something else.
    """

    images: str
    annotations: str
    image_ending: str = ""
    label_endings: tuple[str, ...] = ("",)


LAYOUTS = (
    Layout("images", "annotations"),
    Layout("leftImg8bit", "gtFine", "_leftImg8bit", ("_gtFine_labelIds", "_gtFine_labelTrainIds")),  # Cityscapes
)
# Video files that OpenCV reads. Pillow registers some of these extensions but cannot read the files.
VIDEO_ENDINGS = (
    ".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".asf", ".flv", ".3gp", ".3g2", ".ts",
    ".mts", ".m2ts", ".ogv", ".vob", ".mjpeg", ".mxf",
)  # fmt: skip
VOC_IMAGES, VOC_LABELS, VOC_LISTS = "JPEGImages", "SegmentationClass", "ImageSets"  # PASCAL VOC


def read_lines(path: Path) -> list[str]:
    """Lines of a list, whatever system has ended them.

    Raises:
        ListError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: names may have other separators
    except (OSError, UnicodeDecodeError) as error:
        raise ListError(f"list {path} cannot be read: {error}") from None


def composed(name: str) -> str:
    """Normalize a name to NFC: macOS stores accented letters decomposed (NFD)."""
    return unicodedata.normalize("NFC", name)


def read_split(path: Path, root: str | os.PathLike = "", problems: list[str] | None = None) -> list[Record]:
    """Records of a split list of PASCAL VOC, in a folder ImageSets.

    Every line begins with a stem, or holds the paths of an image and its label below the folder above ImageSets, as the
    lists of the augmented set do.

    Raises:
        ListError: the list is empty or files are missing (unless `problems` takes them, a sentence each).
    """
    base = next(p.parent for p in path.absolute().parents if p.name == VOC_LISTS)
    images = {composed(p.stem): p for p in find_images(base / VOC_IMAGES)}
    labels = {composed(p.stem): p for p in find_images(base / VOC_LABELS)}
    pairs = []
    for words in (line.split() for line in read_lines(path) if line.strip()):
        if len(words) > 1 and all(Path(word).suffix for word in words[:2]):
            pairs.append(tuple(base / word.lstrip("/") for word in words[:2]))
        else:
            stem = composed(words[0])
            image = images.get(stem, base / VOC_IMAGES / f"{words[0]}.jpg")
            pairs.append((image, labels.get(stem, base / VOC_LABELS / f"{words[0]}.png")))
    missing = [str(p) for pair in pairs for p in pair if not p.is_file()]
    if missing and problems is None:
        raise ListError(f"{path}: {len(missing)} files are missing: {shorten(missing, 3)}")
    if not pairs:
        raise ListError(f"list {path} is empty")
    there = [pair for pair in pairs if all(p.is_file() for p in pair)]
    if not there:
        raise ListError(f"{path}: all files are missing: {shorten(missing, 3)}")
    if missing:
        problems += [f"{file} is missing" for file in missing]
    return _records(there, root, str(path))


def scan_pairs(folder: Path, root: str | os.PathLike = "", problems: list[str] | None = None) -> list[Record]:
    """Records of a folder pair, sizes from the image headers; images and annotations pair up by relative stem, without
    the endings of the layout.

    A picture with an unreadable header is listed without its size.

    Raises:
        ListError: no annotations folder, or files without a partner (all of them counted, the first ones named).
    """
    images, annotations, layout = _pair_of_folders(folder)
    found = [] if problems is None else problems
    by_stem, labels = _by_stem(images, layout.image_ending, found, all_of_them=True), {}
    for ending in reversed(layout.label_endings):
        labels |= _by_stem(annotations, ending, found)
    wanted = annotations, layout.label_endings[0]
    found += [_lonely(path, wanted, stem) for stem, path in by_stem.items() if stem not in labels]
    wanted = images, layout.image_ending
    found += [_lonely(path, wanted, stem) for stem, path in labels.items() if stem not in by_stem]
    if problems is None and found:
        raise ListError(f"{images} and {annotations}: {len(found)} files do not pair up: {shorten(found, 3)}")
    if not by_stem:
        raise ListError(f"{images}: no images")
    stems = sorted(by_stem.keys() & labels.keys())
    if not stems:
        raise ListError(f"{images} and {annotations}: no files pair up: {shorten(found, 3)}")
    return _records([(by_stem[stem], labels[stem]) for stem in stems], root, str(folder))


def _lonely(path: Path, wanted: tuple[Path, str], stem: str) -> str:
    folder, ending = wanted
    return f"{path} has no partner {folder / stem}{ending}.*"


def _records(pairs: list[tuple[Path, Path]], root: str | os.PathLike, where: str) -> list[Record]:
    return [
        {"fpath_img": _relative(image, root), "fpath_segm": _relative(label, root), **_size(image)}
        for image, label in progress_bar(pairs, desc=f"reading sizes in {where}", unit="img", leave=False)
    ]


def _size(path: Path) -> dict[str, int]:
    """`width` and `height` of a picture; neither if it is unreadable, which whoever opens it will say."""
    try:
        width, height = image_size(path)
    except ImageFileError:
        return {}
    return {"width": width, "height": height}


def _pair_of_folders(folder: Path) -> tuple[Path, Path, Layout]:
    parts = folder.parts
    for layout in LAYOUTS:
        candidates = [(folder / layout.images, folder / layout.annotations)]
        for i in reversed(range(len(parts))):
            if parts[i] == layout.images:
                candidates.append((folder, Path(*parts[:i], layout.annotations, *parts[i + 1 :])))
        for images, annotations in candidates:
            if images.is_dir() and annotations.is_dir():
                return images, annotations, layout
    twins = " or ".join(f"{layout.images}/ and {layout.annotations}/" for layout in LAYOUTS)
    raise ListError(f"{folder}: expected folders {twins} in it, or a path with the first as a part that has its twin")


def _by_stem(folder: Path, ending: str, problems: list[str], *, all_of_them: bool = False) -> dict[str, Path]:
    """Images below a folder whose stems have the ending, by the rest of their stems; all of them should have it."""
    found: dict[str, Path] = {}
    for path in find_images(folder):
        stem = composed(path.relative_to(folder).with_suffix("").as_posix())
        if not stem.endswith(ending):
            if all_of_them:
                problems.append(f"{path} does not end with {ending}")
            continue
        stem = stem.removesuffix(ending)
        if stem in found:
            problems.append(f"{found[stem]} and {path} have the same stem, by which image and annotation pair up")
        else:
            found[stem] = path
    return found


def _relative(path: Path, root: str | os.PathLike) -> str:
    """Path below `root`, or the absolute path where it is not below."""
    if not root:
        return str(path)
    absolute, above = os.path.abspath(path), os.path.abspath(root)
    return os.path.relpath(absolute, above) if Path(absolute).is_relative_to(above) else absolute


def find_images(folder: str | os.PathLike) -> list[Path]:
    """Every file below a folder whose extension Pillow reads, any case, sorted; hidden files are left out."""
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return find_files(folder, known.difference(VIDEO_ENDINGS))


def find_files(folder: str | os.PathLike, endings: Container[str]) -> list[Path]:
    """Files below a folder with one of these extensions (".png"), in any case, sorted; hidden files are skipped."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if _is_loop(parent):
            folders.clear()
            continue
        found += [Path(parent, f) for f in sorted(files) if Path(f).suffix.lower() in endings and not f.startswith(".")]
    return found


def _is_loop(parent: str) -> bool:
    """Whether a folder reached through links is one of its own ancestors."""
    real, above = os.path.realpath(parent), Path(parent)
    return any(os.path.realpath(ancestor) == real for ancestor in above.parents if str(ancestor) not in ("", "."))


def find_recursive(root_dir: str, ext: str = ".jpg") -> list[str]:
    """Files below a folder whose name ends with `ext`, any case, sorted."""
    pattern = f"*{ext}".lower()
    return sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(root_dir)
        for name in names
        if fnmatch.fnmatch(name.lower(), pattern)
    )
