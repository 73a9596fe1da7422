"""Dataset layouts on disk: find images, pair image and annotation folders, read PASCAL VOC split lists."""

import fnmatch
import os
import unicodedata
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..lib.utils import UserError, shorten_list

Record = dict  # fpath_img; optionally fpath_segm, width and height


class ListError(UserError, ValueError):
    """A list of images or a folder of images cannot be used. The message names the file and the line."""


@dataclass(frozen=True)
class Layout:
    """Two folders with the same structure. An image and its label have the same relative path up to a suffix."""

    images: str
    annotations: str
    image_suffix: str = ""  # end of the file stem of every image
    label_suffixes: tuple[str, ...] = ("",)  # of labels, preferred first; other files are not labels


LAYOUTS = (
    Layout("images", "annotations"),
    Layout("leftImg8bit", "gtFine", "_leftImg8bit", ("_gtFine_labelIds", "_gtFine_labelTrainIds")),  # Cityscapes
)
# Video files that OpenCV reads. Pillow registers some of these extensions but cannot read the files.
VIDEO_ENDINGS = (
    ".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".asf", ".flv", ".3gp", ".3g2", ".ts",
    ".mts", ".m2ts", ".ogv", ".vob", ".mjpeg", ".mxf",
)  # fmt: skip
VOC_IMAGES, VOC_LABELS, VOC_LISTS = "JPEGImages", "SegmentationClass", "ImageSets"  # PASCAL VOC folders


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, with any line ending. Raise ListError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")  # `splitlines` would split names with other separators
    except (OSError, UnicodeDecodeError) as error:
        raise ListError(f"list {path} cannot be read: {error}") from None


def _pairing_key(path: Path) -> str:
    """Return a path without extension, in the Unicode form NFC: macOS stores accented letters decomposed (NFD)."""
    return unicodedata.normalize("NFC", path.with_suffix("").as_posix())


def read_voc_split(path: Path, root: str | os.PathLike = "", problems: list[str] | None = None) -> list[Record]:
    """Return the records of a PASCAL VOC split list in a folder ImageSets, see `load_records`.

    A line starts with a file stem, or has the paths of an image and its label as in the augmented set (SBD).
    """
    base = next(parent.parent for parent in path.absolute().parents if parent.name == VOC_LISTS)
    images = {_pairing_key(Path(p.name)): p for p in find_images(base / VOC_IMAGES)}
    labels = {_pairing_key(Path(p.name)): p for p in find_images(base / VOC_LABELS)}
    pairs = []
    for words in (line.split() for line in read_lines(path) if line.strip()):
        if len(words) > 1 and all(Path(word).suffix for word in words[:2]):
            pairs.append(tuple(base / word.lstrip("/") for word in words[:2]))
        else:
            stem = unicodedata.normalize("NFC", words[0])
            image = images.get(stem, base / VOC_IMAGES / f"{words[0]}.jpg")
            pairs.append((image, labels.get(stem, base / VOC_LABELS / f"{words[0]}.png")))
    if not pairs:
        raise ListError(f"list {path} is empty")
    missing = [str(file) for pair in pairs for file in pair if not file.is_file()]
    complete = [pair for pair in pairs if all(file.is_file() for file in pair)]
    if missing and (problems is None or not complete):
        raise ListError(f"{path}: {len(missing)} of {2 * len(pairs)} files are missing: {shorten_list(missing, 3)}")
    if problems is not None:
        problems += [f"{file} is missing" for file in missing]
    return _make_records(complete, root)


def scan_folders(folder: Path, root: str | os.PathLike = "", problems: list[str] | None = None) -> list[Record]:
    """Return the records of an image folder and its annotation folder, see `load_records`."""
    images, annotations, layout = _find_layout(folder)
    found: list[str] = []
    image_files, label_files = _files_by_key(images, layout.image_suffix, found, required=True), {}
    for suffix in reversed(layout.label_suffixes):
        label_files |= _files_by_key(annotations, suffix, found)
    for files, partners, partner_folder, suffix in (
        (image_files, label_files, annotations, layout.label_suffixes[0]),
        (label_files, image_files, images, layout.image_suffix),
    ):
        lonely = files.keys() - partners.keys()
        found += [f"{files[key]} has no partner {partner_folder / key}{suffix}.*" for key in sorted(lonely)]
    keys = sorted(image_files.keys() & label_files.keys())
    if not image_files:
        raise ListError(f"{images}: the folder has no images")
    if found and (problems is None or not keys):
        raise ListError(f"{images} and {annotations}: {len(found)} files do not form pairs: {shorten_list(found, 3)}")
    if problems is not None:
        problems += found
    return _make_records([(image_files[key], label_files[key]) for key in keys], root)


def _find_layout(folder: Path) -> tuple[Path, Path, Layout]:
    """Return the image folder, the annotation folder and their layout."""
    parts = folder.parts
    for layout in LAYOUTS:
        candidates = [(folder / layout.images, folder / layout.annotations)]
        for i in reversed(range(len(parts))):
            if parts[i] == layout.images:
                candidates.append((folder, Path(*parts[:i], layout.annotations, *parts[i + 1 :])))
        for images, annotations in candidates:
            if images.is_dir() and annotations.is_dir():
                return images, annotations, layout
    names = " or ".join(f"{layout.images}/ and {layout.annotations}/" for layout in LAYOUTS)
    raise ListError(f"{folder}: expected the folders {names} in it, or an image folder next to its annotation folder")


def _files_by_key(folder: Path, suffix: str, problems: list[str], *, required: bool = False) -> dict[str, Path]:
    """Map relative paths without suffix and extension to the files; with `required`, other files are problems."""
    files: dict[str, Path] = {}
    for path in find_images(folder):
        key = _pairing_key(path.relative_to(folder))
        if not key.endswith(suffix):
            if required:
                problems.append(f"{path} does not end with {suffix}")
            continue
        other = files.setdefault(key.removesuffix(suffix), path)
        if other != path:
            problems.append(f"{other} and {path} have the same name except for the extension")
    return files


def _make_records(pairs: list[tuple[Path, Path]], root: str | os.PathLike) -> list[Record]:
    """Return records with paths relative to `root`; paths that are not below `root` are absolute."""

    def relative(path: Path) -> str:
        absolute, base = Path(os.path.abspath(path)), os.path.abspath(root)
        return str(absolute.relative_to(base) if absolute.is_relative_to(base) else absolute) if root else str(path)

    return [{"fpath_img": relative(image), "fpath_segm": relative(label)} for image, label in pairs]


def find_images(folder: str | os.PathLike) -> list[Path]:
    """Return all files below a folder whose extension Pillow reads, sorted; see `find_files`."""
    readable = {ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN}
    return find_files(folder, readable.difference(VIDEO_ENDINGS))


def find_files(folder: str | os.PathLike, endings: Container[str]) -> list[Path]:
    """Return all files below a folder with one of the extensions (".png") in any case, sorted. Skip hidden files."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(parent)
        if any(os.path.realpath(above) == real for above in Path(parent).parents if str(above) != "."):  # a link loop
            folders.clear()
            continue
        found += [Path(parent, f) for f in sorted(files) if Path(f).suffix.lower() in endings and not f.startswith(".")]
    return found


def find_recursive(root_dir: str, ext: str = ".jpg") -> list[str]:
    """Return all files below a folder whose name ends with `ext` in any case, sorted."""
    files = (os.path.join(parent, name) for parent, _, names in os.walk(root_dir) for name in names)
    return sorted(file for file in files if fnmatch.fnmatch(os.path.basename(file).lower(), f"*{ext}".lower()))
