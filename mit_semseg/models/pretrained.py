"""Download published models and ImageNet weights, and convert them to our state dicts."""

import logging
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from torch import Tensor, nn

from ..lib.utils import atomic_write, is_terminal
from .weight_files import WeightsError, read_state_dict
from .weights import load_weights

logger = logging.getLogger(__name__)

SERVER = "http://sceneparsing.csail.mit.edu/model"
TORCHVISION = "https://download.pytorch.org/models"
MIRROR_VARIABLE = "MIT_SEMSEG_MIRROR"
TIMEOUT = 15  # seconds to wait for a connection, and for the next data
LOCK = threading.Lock()  # threads would write to the same temporary file

IMAGENET_FILES = {
    "resnet18": "resnet18-imagenet.pth",
    "resnet50": "resnet50-imagenet.pth",
    "resnet101": "resnet101-imagenet.pth",
    "resnext101": "resnext101-imagenet.pth",
    "mobilenetv2": "mobilenet_v2.pth.tar",
    "hrnetv2": "hrnetv2_w48-imagenet.pth",
    "vgg16_dilated8": "vgg16-397923af.pth",  # from torchvision
    "vgg19_dilated8": "vgg19-dcbb9e9d.pth",
}

# Published models -> epoch number in their file names
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

# SHA-256 digests (or their first digits) of the encoder file and the decoder file
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
    """Return the folder for downloaded weights: `$MIT_SEMSEG_HOME`, by default `mit_semseg` in the user's cache."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.environ.get("MIT_SEMSEG_HOME") or f"{user_cache}/mit_semseg"))


def download(url: str, path: Path, *, sha256: str = "", advice: str = "") -> Path:
    """Download `url` to `path` unless it exists; return `path`. Incomplete or wrong files are deleted.

    For an http URL without port, https is tried first. `sha256` is a hexadecimal digest or its first digits; '' means
    that the digest is unknown. Raises a WeightsError, with `advice` in its message, if the download fails.
    """
    if path.is_file():
        return path
    import pooch  # imported here because the import is slow

    parts = urlsplit(url)
    urls = [parts._replace(scheme="https").geturl(), url] if parts.scheme == "http" and not parts.port else [url]
    for attempt in urls:
        try:
            with LOCK, atomic_write(path) as partial:
                pooch.HTTPDownloader(progressbar=is_terminal(sys.stderr), timeout=TIMEOUT)(attempt, partial, None)
                if not (digest := pooch.file_hash(partial)).startswith(sha256.lower()):
                    raise ValueError(f"SHA-256 is {digest}, expected {sha256}")
            break
        except Exception as error:  # error of the connection, server or disk, or wrong digest
            reason = " ".join(str(error).split())[:300]
    else:
        raise WeightsError(
            f"cannot download {url} ({reason}); {advice}put {path.name} into {path.parent}, or set {MIRROR_VARIABLE} "
            "to the URL of a mirror"
        )
    if attempt.startswith("http:") and not sha256:
        logger.warning("%s was downloaded over unencrypted http and not verified, because its SHA-256 is unknown", url)
    return path


def _imagenet_file(arch: str) -> str | None:
    return IMAGENET_FILES.get(arch.removesuffix("_cityscapes").removesuffix("dilated"))


def has_imagenet_weights(arch: str) -> bool:
    """Return whether ImageNet weights are published for the encoder `arch`."""
    return _imagenet_file(arch) is not None


def load_imagenet_weights(encoder: nn.Module, arch: str) -> None:
    """Load ImageNet weights, without their classifier, from the cache or the server into an encoder.

    Raises a WeightsError if no weights are published for `arch` or the download fails.
    """
    file, vgg = _imagenet_file(arch), arch.startswith("vgg")
    advice = (
        "give a file with weights (MODEL.weights_encoder, or weights= of build_encoder), or start from random weights "
        "(MODEL.pretrained False, or pretrained=False)"
    )
    if file is None:
        raise WeightsError(f"no ImageNet weights are published for {arch}: {advice}")
    folder = TORCHVISION if vgg and not os.environ.get(MIRROR_VARIABLE) else f"{_server()}/pretrained_resnet"
    digest = Path(file).stem.rpartition("-")[2] if vgg else ""  # the names of torchvision's files end with the digest
    path = download(f"{folder}/{file}", cache_dir() / file, sha256=digest, advice=f"{advice}, or ")
    state, own = read_state_dict(path), encoder.state_dict()
    state = convert_torchvision_vgg(state, own) if vgg else {key: state[key] for key in state if key in own}
    load_weights(encoder, path, state=state, name=f"encoder {arch}")


def convert_torchvision_vgg(state: dict[str, Tensor], own_keys: Iterable[str]) -> dict[str, Tensor]:
    """Convert a state dict of torchvision's VGG; `own_keys` lists the keys of our convolutions in the same order."""
    theirs, ours = ([key for key in keys if key.startswith("features.")] for keys in (state, own_keys))
    converted = {own: state[key] for own, key in zip(ours, theirs, strict=True)}
    for layer, name, shape in (("classifier.0", "conv6", (512, 7, 7)), ("classifier.3", "conv7", (4096, 1, 1))):
        converted[f"{name}.weight"] = state[f"{layer}.weight"].view(-1, *shape)
        converted[f"{name}.bias"] = state[f"{layer}.bias"]
    return converted


def published_options(name: str) -> list[str]:
    """Return the configuration options of a published model as `[key, value, key, value, ...]`."""
    encoder, decoder = name.split("-")[1:]
    padding, downsampling = (32, 4) if encoder == "hrnetv2" or decoder == "upernet" else (8, 8)
    return (
        f"MODEL.arch_encoder {encoder} MODEL.arch_decoder {decoder} DATASET.padding_constant {padding} "
        f"DATASET.segm_downsampling_rate {downsampling} TEST.checkpoint epoch_{PUBLISHED[name]}.pth"
    ).split()


def download_published(name: str, folder: str | os.PathLike | None = None) -> tuple[Path, Path]:
    """Return the paths (encoder, decoder) of a published model in `folder` or the cache; download missing files.

    Raises a WeightsError if the name is unknown or the download fails.
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
