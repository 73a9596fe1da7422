"""Published and ImageNet weights: where they are stored, download and conversion."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from shutil import copyfile
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import FileLock
from torch import Tensor, nn

from ..lib.utils import is_terminal
from .weight_files import WeightsError, read_state_dict
from .weights import LoadReport, load_weights

logger = logging.getLogger(__name__)

SERVER = "http://sceneparsing.csail.mit.edu/model"
TORCHVISION = "https://download.pytorch.org/models"
MIRROR_VARIABLE = "MIT_SEMSEG_MIRROR"
CACHE_VARIABLE = "MIT_SEMSEG_HOME"
TIMEOUT = 15  # seconds to connect, and between two packets

IMAGENET_FILES = {
    "resnet18": "resnet18-imagenet.pth",
    "resnet50": "resnet50-imagenet.pth",
    "resnet101": "resnet101-imagenet.pth",
    "resnext101": "resnext101-imagenet.pth",
    "mobilenetv2": "mobilenet_v2.pth.tar",
    "hrnetv2": "hrnetv2_w48-imagenet.pth",
}
VGG_FILES = {"vgg16_dilated8": "vgg16-397923af.pth", "vgg19_dilated8": "vgg19-dcbb9e9d.pth"}  # torchvision

# Published models and their last epoch
PUBLISHED = {
    "ade20k-mobilenetv2dilated-c1_deepsup": 20,
    "ade20k-resnet18dilated-c1_deepsup": 20,
    "ade20k-resnet18dilated-ppm_deepsup": 20,
    "ade20k-resnet50dilated-ppm_deepsup": 20,
    "ade20k-resnet101dilated-ppm_deepsup": 25,
    "ade20k-resnet50-upernet": 30,
    "ade20k-resnet101-upernet": 50,
    "ade20k-hrnetv2-c1": 30,
}

# SHA-256 of the published encoder and decoder, or the known first digits
SHA256 = {
    "ade20k-resnet18dilated-ppm_deepsup": (
        "adcdcbf7530eaf358f2bdeee13186c0d09e7a039bff842715b84395c841738b9",
        "b9def740d73cb425ae5e17a13949400c044159099cadc957c0743b721be2289e",
    ),
    "ade20k-mobilenetv2dilated-c1_deepsup": (
        "f9271676",
        "23acb59ae788d6987927013167e3253068dfcc4505dfee379e77304a0f985c29",
    ),
}


def cache_dir() -> Path:
    """Return the folder of downloaded weights: `MIT_SEMSEG_HOME`, or `mit_semseg` in the user's cache directory, or in
    the temporary directory if the user has no home directory."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(os.environ.get(CACHE_VARIABLE) or f"{user_cache}/mit_semseg").expanduser()
    except RuntimeError:
        fallback = Path(tempfile.gettempdir(), "mit_semseg")
        logger.warning("no home directory: weights are stored in %s; set %s to change it", fallback, CACHE_VARIABLE)
        return fallback


def download(url: str, path: Path, *, sha256: str = "", advice: str = "") -> Path:
    """Download a file unless it exists; `path` is created only after a complete and verified download.

    An http URL without port is tried as https first. Concurrent processes download the file once.

    Args:
        url: http, https or file URL.
        path: file to create, with its folder.
        sha256: hexadecimal digest or its first digits; '' disables the check.
        advice: what else the user can do, for the error message.

    Raises:
        WeightsError: the download failed; names the URL, the reason and what to do.
    """
    if path.is_file():
        return path
    try:
        parts = urlsplit(url)
        urls = [parts._replace(scheme="https").geturl(), url] if parts.scheme == "http" and not parts.port else [url]
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f"{path.name}.lock")
        with FileLock(lock):
            if not path.is_file():
                _retrieve(urls, path, sha256)
        lock.unlink(missing_ok=True)
    except Exception as error:  # connection, server, disk or digest
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"cannot download {url} ({reason}): {advice}put {path.name} into {path.parent}, or set {MIRROR_VARIABLE} "
            f"to the URL of a mirror"
        ) from None
    return path


def _retrieve(urls: list[str], path: Path, sha256: str) -> None:
    """Download the first URL that works with pooch, which writes to a temporary file and renames it."""
    import pooch  # slow to import

    def fetch(url: str, temporary: str, _) -> None:
        if url.startswith("file:"):
            copyfile(url2pathname(urlsplit(url).path), temporary)
        else:
            pooch.HTTPDownloader(progressbar=is_terminal(sys.stderr), timeout=TIMEOUT)(url, temporary, None)
        if not (digest := pooch.file_hash(temporary)).startswith(sha256.lower()):
            raise ValueError(f"SHA-256 is {digest}, expected {sha256}")

    log = pooch.get_logger()
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        for url in urls:
            try:
                pooch.retrieve(url, known_hash=None, fname=path.name, path=path.parent, downloader=fetch)
                break
            except Exception as error:
                if url == urls[-1]:
                    raise
                logger.info("cannot download %s: %s", url, error)
    finally:
        log.setLevel(level)
    path.chmod(0o644)  # pooch leaves the permissions of a temporary file
    if url.startswith("http:") and not sha256:
        logger.warning("%s was downloaded over unencrypted http and has no known SHA-256", url)


def _imagenet_file(arch: str) -> str | None:
    return VGG_FILES.get(arch) or IMAGENET_FILES.get(arch.removesuffix("_cityscapes").removesuffix("dilated"))


def has_imagenet_weights(arch: str) -> bool:
    """Return whether ImageNet weights of an encoder are published."""
    return _imagenet_file(arch) is not None


def load_imagenet_weights(encoder: nn.Module, arch: str) -> LoadReport:
    """Load ImageNet weights into an encoder, from the cache or the server.

    Raises:
        WeightsError: no weights are published for `arch`, or the download failed.
    """
    file, mirror = _imagenet_file(arch), os.environ.get(MIRROR_VARIABLE)
    advice = (
        "set a file (MODEL.weights_encoder, or weights= of build_encoder), start from random weights "
        "(MODEL.pretrained False, or pretrained=False)"
    )
    if file is None:
        raise WeightsError(f"no ImageNet weights are published for {arch}: {advice}")
    folder = f"{_server()}/pretrained_resnet" if mirror or arch not in VGG_FILES else TORCHVISION
    digest = Path(file).stem.rpartition("-")[2] if arch in VGG_FILES else ""  # torchvision's file names end in it
    path = download(f"{folder}/{file}", cache_dir() / file, sha256=digest, advice=f"{advice}, ")
    state = read_state_dict(path)
    if arch in VGG_FILES:
        state = convert_torchvision_vgg(state, encoder.state_dict())
    return load_weights(encoder, path, state=state, name=f"ImageNet weights of {arch}", ignore_unexpected=True)


def convert_torchvision_vgg(state: dict[str, Tensor], own_keys: Iterable[str]) -> dict[str, Tensor]:
    """Convert a state dict of torchvision's VGG: the convolutions are matched in order, and the fully connected layers
    become convolutions.

    Args:
        state: state dict of torchvision.
        own_keys: keys of our VGG.
    """
    theirs = (key for key in state if key.startswith("features."))
    ours = (key for key in own_keys if key.startswith("features."))
    converted = {own: state[key] for own, key in zip(ours, theirs, strict=True)}
    for layer, name, shape in (("classifier.0", "conv6", (512, 7, 7)), ("classifier.3", "conv7", (4096, 1, 1))):
        converted[f"{name}.weight"] = state[f"{layer}.weight"].view(-1, *shape)
        converted[f"{name}.bias"] = state[f"{layer}.bias"]
    return converted


def published_options(name: str) -> list[str]:
    """Return the configuration of a published model as `[key, value, ...]`."""
    encoder, decoder = name.split("-")[1:]
    stride_4 = encoder == "hrnetv2" or decoder == "upernet"  # resolution of the logits
    options = {
        "MODEL.arch_encoder": encoder,
        "MODEL.arch_decoder": decoder,
        "DATASET.padding_constant": "32" if stride_4 else "8",
        "DATASET.segm_downsampling_rate": "4" if stride_4 else "8",
        "TEST.checkpoint": f"epoch_{PUBLISHED[name]}.pth",
    }
    return [word for pair in options.items() for word in pair]


def download_published(name: str, folder: str | os.PathLike | None = None) -> tuple[Path, Path]:
    """Return the encoder and decoder files of a published model, downloaded if they do not exist.

    Args:
        name: a key of `PUBLISHED`.
        folder: folder of the files, by default in the cache.

    Raises:
        WeightsError: unknown name, or the download failed.
    """
    if name not in PUBLISHED:
        raise WeightsError(f"unknown published model {name!r}; choose one of {', '.join(PUBLISHED)}")
    folder = Path(folder) if folder else cache_dir() / name
    paths = [folder / f"{part}_epoch_{PUBLISHED[name]}.pth" for part in ("encoder", "decoder")]
    for path, sha256 in zip(paths, SHA256.get(name, ("", "")), strict=True):
        download(f"{_server()}/pytorch/{name}/{path.name}", path, sha256=sha256)
    return paths[0], paths[1]


def _server() -> str:
    return (os.environ.get(MIRROR_VARIABLE) or SERVER).rstrip("/")
