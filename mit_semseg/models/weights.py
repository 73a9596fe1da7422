"""Published weights: where they are, how they are downloaded, and how any file of weights is read and loaded."""

import hashlib
import logging
import os
import pickle
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..lib.utils import UserError, some, whole_file

logger = logging.getLogger(__name__)

SERVER = "http://sceneparsing.csail.mit.edu/model"
MIRROR_VARIABLE = "MIT_SEMSEG_MIRROR"
CACHE_VARIABLE = "MIT_SEMSEG_HOME"
TIMEOUT = 15  # seconds without a byte after which a server counts as not answering

# Buffers that the batch norms of the published files carry and ours need not have.
LEGACY_SUFFIXES = ("._tmp_running_mean", "._tmp_running_var", "._running_iter")
OPTIONAL_SUFFIX = ".num_batches_tracked"

IMAGENET_BASES = {
    "resnet18": "resnet18-imagenet.pth",
    "resnet50": "resnet50-imagenet.pth",
    "resnet101": "resnet101-imagenet.pth",
    "resnext101": "resnext101-imagenet.pth",
    "mobilenetv2": "mobilenet_v2.pth.tar",
    "hrnetv2": "hrnetv2_w48-imagenet.pth",
}

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


class WeightsError(UserError, RuntimeError):
    """Weights that cannot be had, read or loaded; the message says what to do."""


@dataclass
class LoadReport:
    """What became of the entries of a weights file."""

    what: str
    path: str
    loaded: list[str] = field(default_factory=list)
    legacy: list[str] = field(default_factory=list)  # batch-norm buffers of the published files, not needed
    skipped: list[str] = field(default_factory=list)  # classifier entries of another number of classes
    surplus: list[str] = field(default_factory=list)  # entries the model has no place for
    missing: list[str] = field(default_factory=list)  # batch-norm counters that the file does not have

    def __str__(self) -> str:
        parts = [f"{self.what}: loaded {len(self.loaded)} entries of {self.path}"]
        if self.legacy:
            parts.append(f"{len(self.legacy)} legacy batch-norm buffers not needed")
        if self.missing:
            parts.append(f"{len(self.missing)} batch-norm counters absent in the file")
        if self.skipped:
            parts.append(f"started anew (other number of classes): {', '.join(self.skipped)}")
        if self.surplus:
            parts.append(f"not used: {some(self.surplus)}")
        return "; ".join(parts)


def read_checkpoint(path: str | os.PathLike):
    """Read any file written by `torch.save`, on the CPU, without running code from it.

    Args:
        path: a checkpoint, saved on any device.

    Raises:
        WeightsError: there is no such file, it is damaged, or it holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.pth*")) if path.parent.is_dir() else []
        there = f"; there is {some(near)}" if near else ""
        raise WeightsError(f"no checkpoint {path}{there}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()
        detail = next(
            (line for line in reason if "GLOBAL" in line or "Unsupported" in line), reason[0] if reason else ""
        )
        raise WeightsError(
            f"{path} was refused: it is damaged or holds more than tensors and plain values, and code from a "
            f"checkpoint is never run ({detail.strip()[:200]})"
        ) from None
    except Exception as error:  # the reader meets damaged bytes with any exception there is
        raise WeightsError(f"{path} cannot be read, it is damaged or no checkpoint: {str(error)[:200]}") from None


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a file, without a `state_dict` wrapper or the `module.` prefix of a data parallel model.

    Raises:
        WeightsError: see `read_checkpoint`; or the file holds no state dict.
    """
    state = read_checkpoint(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        kind = f"keys {some([str(k) for k in state])}" if isinstance(state, dict) else type(state).__name__
        raise WeightsError(f"{path} holds no state dict (names -> tensors) but {kind}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_weights(
    module: nn.Module, path: str | os.PathLike, *, what: str = "model", new_head: bool = False, base: bool = False
) -> LoadReport:
    """Load a state dict strictly and say what was loaded.

    Only the legacy batch-norm buffers of the published files may be surplus, and only `num_batches_tracked` missing.

    Args:
        module: encoder or decoder to fill.
        path: file of the state dict.
        what: how to call the module in messages.
        new_head: classifier entries of another number of classes keep their fresh values, and are listed.
        base: the file is the ImageNet base of an encoder: its classifier is not used, and listed.

    Raises:
        WeightsError: the file cannot be read or does not fit; `module` is then unchanged.
    """
    own, report, fitting, wrong = module.state_dict(), LoadReport(what, str(path)), {}, []
    for key, value in read_state_dict(path).items():
        if key not in own:
            (report.legacy if key.endswith(LEGACY_SUFFIXES) else report.surplus).append(key)
        elif value.shape == own[key].shape:
            fitting[key] = value
        elif new_head and key.startswith("conv_last") and value.shape[1:] == own[key].shape[1:]:
            report.skipped.append(key)
        else:
            wrong.append(f"{key} is {tuple(value.shape)}, the model's {tuple(own[key].shape)}")
    absent = [key for key in own if key not in fitting and key not in report.skipped and not _named(key, wrong)]
    report.missing = [key for key in absent if key.endswith(OPTIONAL_SUFFIX)]
    lacking = [key for key in absent if not key.endswith(OPTIONAL_SUFFIX)]
    surplus = [] if base else report.surplus
    if wrong or lacking or surplus:
        problems = [
            f"{label}: {some(names)}"
            for label, names in (
                ("other shape", wrong),
                ("missing in the file", lacking),
                ("unknown to the model", surplus),
            )
            if names
        ]
        hint = ""
        if wrong and all(line.startswith("conv_last") for line in wrong) and not lacking and not surplus:
            hint = (
                "; the file has another number of classes: give the model the same number, or, to train on from here, "
                "start the classifier anew (MODEL.new_head True, new_head=True)"
            )
        raise WeightsError(f"{path} does not fit {what}: {'; '.join(problems)}{hint}")
    module.load_state_dict(fitting, strict=False)
    report.loaded = list(fitting)
    logger.info("%s", report)
    return report


def is_of_version_1(path: str | os.PathLike) -> bool:
    """Whether a file holds a ResNet of version 1.0, whose stem ends in 64 channels (later: 128)."""
    return read_state_dict(path).get("conv3.weight", torch.empty(0)).shape[:1] == (64,)


def _named(key: str, lines: list[str]) -> bool:
    return any(line.startswith(f"{key} is ") for line in lines)


def cache_dir() -> Path:
    """Folder of downloaded weights: `MIT_SEMSEG_HOME`, else `mit_semseg` in the user's cache directory."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mit_semseg"


def server() -> str:
    """Address of the published files: `MIT_SEMSEG_MIRROR` if set, else the authors' server."""
    return (os.environ.get(MIRROR_VARIABLE) or SERVER).rstrip("/")


def download(url: str, path: Path, *, sha256: str = "") -> Path:
    """Download a file; under its final name there is the whole file or nothing.

    `torch.hub.download_url_to_file` does the same but waits for ever on a server that stops answering.

    Args:
        url: http, https or file address.
        path: final name; its folder is made.
        sha256: hexadecimal digest, or its beginning; '' is not checked.

    Raises:
        WeightsError: the server does not answer, or what came is not the file.
    """
    digest, received = hashlib.sha256(), 0
    try:
        with (
            whole_file(path) as partial,
            urllib.request.urlopen(url, timeout=TIMEOUT) as response,
            open(partial, "wb") as out,
        ):
            expected = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=expected or None, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while chunk := response.read(1 << 20):
                    out.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
                    bar.update(len(chunk))
            if expected and received != expected:
                raise WeightsError(f"{url}: the connection ended after {received} of {expected} bytes")
            if not digest.hexdigest().startswith(sha256.lower()):
                raise WeightsError(f"{url}: SHA-256 is {digest.hexdigest()}, expected {sha256}")
    except (urllib.error.URLError, HTTPException, OSError, ValueError) as error:
        status = isinstance(error, urllib.error.HTTPError)
        raise WeightsError(f"{url}: {error if status else getattr(error, 'reason', error)}") from None
    return path


def load_imagenet_base(encoder: nn.Module, arch: str) -> LoadReport:
    """Fill an encoder with its ImageNet base, from the cache or the server.

    Raises:
        WeightsError: there is no base for `arch`, or it cannot be had; names the ways out.
    """
    file = IMAGENET_BASES.get(arch.removesuffix("dilated"))
    ways = (
        "give a file (MODEL.weights_encoder, or weights= of build_encoder), start from random weights "
        "(MODEL.pretrained False, or pretrained=False)"
    )
    if file is None:
        raise WeightsError(f"no ImageNet base was published for {arch}: {ways}")
    path = cache_dir() / file
    if not path.is_file():
        try:
            download(f"{server()}/pretrained_resnet/{file}", path)
        except WeightsError as error:
            raise WeightsError(
                f"the ImageNet base of {arch} cannot be downloaded ({error}): {ways}, or name a mirror in "
                f"{MIRROR_VARIABLE}"
            ) from None
    return load_weights(encoder, path, what=f"ImageNet base of {arch}", base=True)


def fetch_published(name: str, folder: str | os.PathLike | None = None) -> tuple[Path, Path]:
    """Encoder and decoder files of a published model, downloaded unless they are there.

    Args:
        name: a key of `PUBLISHED`.
        folder: where to keep them; the cache by default.

    Raises:
        WeightsError: unknown name, or the server does not answer.
    """
    if name not in PUBLISHED:
        raise WeightsError(f"there is no published model {name!r}; there are {', '.join(PUBLISHED)}")
    folder = Path(folder) if folder else cache_dir() / name
    paths = []
    for part in ("encoder", "decoder"):
        file = f"{part}_epoch_{PUBLISHED[name]}.pth"
        paths.append(folder / file)
        if not paths[-1].is_file():
            download(f"{server()}/pytorch/{name}/{file}", paths[-1], sha256=SHA256.get(f"{name}/{file}", ""))
    return paths[0], paths[1]
