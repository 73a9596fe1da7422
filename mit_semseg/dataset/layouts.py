"""Find images on disk, pair them with labels, and read PASCAL VOC split lists."""

import os
import unicodedata
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..lib.utils import UserError

Record = dict  # has the key fpath_img, and optionally fpath_segm, width and height


class ListError(UserError, ValueError):
    """A list or folder of images cannot be used."""


@dataclass(frozen=True)
class Layout:
    """Folder names and suffixes. Paths of an image and its label in the folders differ only in suffix and extension."""

    images: str  # name of the image folder
    annotations: str  # name of the annotation folder
    image_suffix: str = ""  # common end of all image names before the extension
    label_suffixes: tuple[str, ...] = ("",)  # suffixes of label names, in order of preference


LAYOUTS = (
    Layout("images", "annotations"),
    Layout("leftImg8bit", "gtFine", "_leftImg8bit", ("_gtFine_labelIds", "_gtFine_labelTrainIds")),  # Cityscapes
)
# Extensions of videos that OpenCV reads. Pillow registers some of them, but cannot read such files.
VIDEO_ENDINGS = (
    ".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".asf", ".flv", ".3gp", ".3g2", ".ts",
    ".mts", ".m2ts", ".ogv", ".vob", ".mjpeg", ".mxf",
)  # fmt: skip
VOC_IMAGES, VOC_LABELS, VOC_LISTS = "JPEGImages", "SegmentationClass", "ImageSets"  # folder names in PASCAL VOC


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file. Raise ListError if the file cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")  # `splitlines` would also split file names at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise ListError(f"list {path} cannot be read: {error}") from None


def _pairing_key(path: Path) -> str:
    """Return a path without extension in Unicode form NFC, because macOS stores accented letters in form NFD."""
    return unicodedata.normalize("NFC", path.with_suffix("").as_posix())


def read_voc_split(path: Path, root: str | os.PathLike = "") -> tuple[list[Record], list[str]]:
    """Read a PASCAL VOC split list below a folder ImageSets. Return records, and one message per missing file.

    Each line starts with an image name without extension, or with the paths of an image and its label, as in lists of
    the augmented dataset (SBD).
    """
    base = next(parent.parent for parent in path.absolute().parents if parent.name == VOC_LISTS)
    images, labels = (_files_by_key(base / folder, "", []) for folder in (VOC_IMAGES, VOC_LABELS))
    pairs = []
    for words in (line.split() for line in read_lines(path) if line.strip()):
        if len(words) > 1 and all(Path(word).suffix for word in words[:2]):
            pairs.append([base / word.lstrip("/") for word in words[:2]])
        else:
            stem = unicodedata.normalize("NFC", words[0])
            image = images.get(stem, base / VOC_IMAGES / f"{words[0]}.jpg")
            pairs.append([image, labels.get(stem, base / VOC_LABELS / f"{words[0]}.png")])
    missing = [f"{file} is missing" for pair in pairs for file in pair if not file.is_file()]
    return [_make_record(*pair, root) for pair in pairs if all(file.is_file() for file in pair)], missing


def scan_folders(folder: Path, root: str | os.PathLike = "") -> tuple[list[Record], list[str]]:
    """Pair the images of a folder with their labels. Return records, and messages about files without a valid pair."""
    images, annotations, layout = _find_layout(folder)
    problems: list[str] = []
    image_files, label_files = _files_by_key(images, layout.image_suffix, problems, required=True), {}
    for suffix in reversed(layout.label_suffixes):
        label_files |= _files_by_key(annotations, suffix, problems)
    for files, partners, partner_folder, suffix in (
        (image_files, label_files, annotations, layout.label_suffixes[0]),
        (label_files, image_files, images, layout.image_suffix),
    ):
        unpaired = files.keys() - partners.keys()
        problems += [f"{files[key]} has no partner {partner_folder / key}{suffix}.*" for key in sorted(unpaired)]
    keys = sorted(image_files.keys() & label_files.keys())
    return [_make_record(image_files[key], label_files[key], root) for key in keys], problems


def _find_layout(folder: Path) -> tuple[Path, Path, Layout]:
    """Find the image folder and annotation folder that belong to `folder`. Return these two and their layout."""
    parts = folder.parts
    for layout in LAYOUTS:
        candidates = [(folder / layout.images, folder / layout.annotations)]
        matches = [i for i in reversed(range(len(parts))) if parts[i] == layout.images]
        candidates += [(folder, Path(*parts[:i], layout.annotations, *parts[i + 1 :])) for i in matches]
        for images, annotations in candidates:
            if images.is_dir() and annotations.is_dir():
                return images, annotations, layout
    names = ", or ".join(f"{layout.images}/ and {layout.annotations}/" for layout in LAYOUTS)
    raise ListError(f"{folder} must contain {names}, or be the image folder of such a pair")


def _files_by_key(folder: Path, suffix: str, problems: list[str], *, required: bool = False) -> dict[str, Path]:
    """Return a dict that maps relative paths without suffix and extension to files. Add messages to `problems`.

    Skip files without the suffix, and add a message for each of them if `required` is True.
    """
    files: dict[str, Path] = {}
    for path in find_images(folder):
        key = _pairing_key(path.relative_to(folder))
        if not key.endswith(suffix):
            if required:
                problems.append(f"{path} does not end with {suffix} before the extension")
            continue
        other = files.setdefault(key.removesuffix(suffix), path)
        if other != path:
            problems.append(f"{other} and {path} have the same name except for the extension; remove one")
    return files


def _make_record(image: Path, label: Path, root: str | os.PathLike) -> Record:
    """Return a record with paths relative to `root`. Paths of files outside `root` are absolute."""
    paths = [str(image), str(label)]
    if root:
        root, paths = os.path.abspath(root), [os.path.abspath(path) for path in paths]
        paths = [os.path.relpath(path, root) if Path(path).is_relative_to(root) else path for path in paths]
    return {"fpath_img": paths[0], "fpath_segm": paths[1]}


def find_images(folder: str | os.PathLike) -> list[Path]:
    """Return the sorted paths of all image files below a folder. Files are selected by extension, see `find_files`."""
    readable = {ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN}
    return find_files(folder, readable.difference(VIDEO_ENDINGS))


def find_files(folder: str | os.PathLike, endings: Container[str]) -> list[Path]:
    """Return the sorted paths of files below a folder that have one of the extensions (".png").

    Hidden files, and links to a folder that contains the link, are skipped.
    """
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        here = Path(parent).resolve()
        names = (name for name in folders if not name.startswith("."))
        folders[:] = sorted(name for name in names if not here.is_relative_to(Path(parent, name).resolve()))
        found += [Path(parent, f) for f in sorted(files) if Path(f).suffix.lower() in endings and not f.startswith(".")]
    return found


def find_recursive(root_dir: str, ext: str = ".jpg") -> list[str]:
    """Return a sorted list of all files below a folder whose names end with `ext`, ignoring case."""
    files = (os.path.join(parent, name) for parent, _, names in os.walk(root_dir) for name in names)
    return sorted(file for file in files if file.lower().endswith(ext.lower()))
