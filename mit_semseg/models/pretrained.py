"""Published weights: where they are, and how they become ours."""

import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from ..lib.download import DownloadError, download
from .weight_files import WeightsError
from .weights import LoadReport, load_weights

logger = logging.getLogger(__name__)

SERVER = "http://sceneparsing.csail.mit.edu/model"
MIRROR_VARIABLE = "MIT_SEMSEG_MIRROR"
CACHE_VARIABLE = "MIT_SEMSEG_HOME"

IMAGENET_FILES = {
    "resnet18": "resnet18-imagenet.pth",
    "resnet50": "resnet50-imagenet.pth",
    "resnet101": "resnet101-imagenet.pth",
    "resnext101": "resnext101-imagenet.pth",
    "mobilenetv2": "mobilenet_v2.pth.tar",
    "hrnetv2": "hrnetv2_w48-imagenet.pth",
}

# torchvision's files: address, and their converter below.
TORCHVISION = "https://download.pytorch.org/models"
VGG_FILES = {"vgg16_dilated8": "vgg16-397923af.pth", "vgg19_dilated8": "vgg19-dcbb9e9d.pth"}

# Published pairs and their last epoch.
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

# SHA-256 (or as much of its beginning as is known) of published files.
SHA256 = {
    "ade20k-resnet18dilated-ppm_deepsup/encoder_epoch_20.pth": (
        "adcdcbf7530eaf358f2bdeee13186c0d09e7a039bff842715b84395c841738b9"
    ),
    "ade20k-resnet18dilated-ppm_deepsup/decoder_epoch_20.pth": (
        "b9def740d73cb425ae5e17a13949400c044159099cadc957c0743b721be2289e"
    ),
    "ade20k-mobilenetv2dilated-c1_deepsup/encoder_epoch_20.pth": "f9271676",
    "ade20k-mobilenetv2dilated-c1_deepsup/decoder_epoch_20.pth": (
        "23acb59ae788d6987927013167e3253068dfcc4505dfee379e77304a0f985c29"
    ),
}


def cache_dir() -> Path:
    """Folder of downloaded weights: `MIT_SEMSEG_HOME`, else `mit_semseg` in the user's cache directory, or in that of
    temporary files for a user without a home directory."""
    named = os.environ.get(CACHE_VARIABLE)
    folder = named or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mit_semseg")
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        elsewhere = Path(tempfile.gettempdir(), "mit_semseg")
        logger.warning("this user has no home directory: weights go to %s; %s names another", elsewhere, CACHE_VARIABLE)
        return elsewhere


def server(folder: str = "", elsewhere: str = "") -> str:
    """Address of the published files: `MIT_SEMSEG_MIRROR` if set, else the authors' server.

    Args:
        folder: of the server.
        elsewhere: address of files that are not the authors'; a mirror has them in `folder` as well.
    """
    mirror = os.environ.get(MIRROR_VARIABLE)
    if elsewhere and not mirror:
        return elsewhere
    return "/".join(part for part in ((mirror or SERVER).rstrip("/"), folder) if part)


def _base_file(arch: str) -> str | None:
    return VGG_FILES.get(arch) or IMAGENET_FILES.get(arch.removesuffix("_cityscapes").removesuffix("dilated"))


def has_imagenet_weights(arch: str) -> bool:
    """Whether the address of an encoder's ImageNet base is known."""
    return _base_file(arch) is not None


def load_imagenet_weights(encoder: nn.Module, arch: str) -> LoadReport:
    """Fill an encoder with its ImageNet base, from the cache or the server.

    Raises:
        WeightsError: there is no base for `arch`, or it cannot be had; names the ways out.
    """
    file = _base_file(arch)
    ways = (
        "give a file (MODEL.weights_encoder, or weights= of build_encoder), start from random weights "
        "(MODEL.pretrained False, or pretrained=False)"
    )
    if file is None:
        raise WeightsError(f"no ImageNet base was published for {arch}: {ways}")
    path = cache_dir() / file
    if not path.is_file():
        folder = server("pretrained_resnet", TORCHVISION) if arch in VGG_FILES else server("pretrained_resnet")
        digest = Path(file).stem.rpartition("-")[2] if arch in VGG_FILES else ""
        try:
            download(f"{folder}/{file}", path, sha256=digest)
        except DownloadError as error:
            raise WeightsError(
                f"the ImageNet base of {arch} cannot be downloaded ({error}): {ways}, or name a mirror in "
                f"{MIRROR_VARIABLE}"
            ) from None
    convert = convert_torchvision_vgg if arch in VGG_FILES else None
    return load_weights(encoder, path, what=f"ImageNet base of {arch}", base=True, convert=convert)


def convert_torchvision_vgg(state: dict[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """torchvision's VGG as ours: no pooling after blocks four and five, fully connected layers as convolutions.

    Args:
        state: torchvision's state dict.
        own: our keys.
    """
    convs = [key for key in state if key.startswith("features.")]
    renamed = dict(zip((key for key in own if key.startswith("features.")), (state[key] for key in convs), strict=True))
    for number, (name, shape) in {0: ("conv6", (512, 7, 7)), 3: ("conv7", (4096, 1, 1))}.items():
        weight = state[f"classifier.{number}.weight"]
        renamed |= {f"{name}.weight": weight.view(-1, *shape), f"{name}.bias": state[f"classifier.{number}.bias"]}
    classifier = {key: value for key, value in state.items() if key.startswith("classifier.6")}
    return renamed | classifier


def published_options(name: str) -> list[str]:
    """Options of a published model, `[key, value, ...]`, as in its file in config/: name and padding."""
    encoder, decoder = name.split("-")[1:]
    fine = encoder == "hrnetv2" or decoder == "upernet"  # predict at stride 4, and pad to the encoder's own stride
    options = {
        "MODEL.arch_encoder": encoder,
        "MODEL.arch_decoder": decoder,
        "DATASET.padding_constant": "32" if fine else "8",
        "DATASET.segm_downsampling_rate": "4" if fine else "8",
        "TEST.checkpoint": f"epoch_{PUBLISHED[name]}.pth",
    }
    return [word for pair in options.items() for word in pair]


def download_published(name: str, folder: str | os.PathLike | None = None) -> tuple[Path, Path]:
    """Encoder and decoder files of a published model, downloaded unless they are there.

    Args:
        name: a key of `PUBLISHED`.
        folder: where to keep them; the cache by default.

    Raises:
        WeightsError: unknown name; or the server does not answer, or what came is not the file, with the ways out.
    """
    if name not in PUBLISHED:
        raise WeightsError(f"there is no published model {name!r}; there are {', '.join(PUBLISHED)}")
    folder = Path(folder) if folder else cache_dir() / name
    paths = []
    for part in ("encoder", "decoder"):
        file = f"{part}_epoch_{PUBLISHED[name]}.pth"
        paths.append(folder / file)
        if paths[-1].is_file():
            continue
        try:
            download(f"{server()}/pytorch/{name}/{file}", paths[-1], sha256=SHA256.get(f"{name}/{file}", ""))
        except DownloadError as error:
            raise WeightsError(
                f"the published model {name} cannot be downloaded ({error}): put encoder_epoch_{PUBLISHED[name]}.pth "
                f"and decoder_epoch_{PUBLISHED[name]}.pth into {folder}, or name a mirror in {MIRROR_VARIABLE}"
            ) from None
    return paths[0], paths[1]
