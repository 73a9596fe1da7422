"""Networks of timm (https://huggingface.co/docs/timm) as encoders."""

import logging
import re
from collections.abc import Mapping
from functools import cached_property

import timm
import torch
from timm.layers import BatchNormAct2d
from timm.models import group_parameters
from torch import Tensor, nn

from ...lib.nn import SynchronizedBatchNorm2d
from ...lib.nn.batchnorm import SYNCHRONIZED, convert_sync_batchnorm
from ...lib.utils import IMAGENET_MEAN, IMAGENET_STD, UserError, closest, shorten_list
from ..layers import DEFAULT_NORM, NormLayer, is_activated, renormalize
from ..pretrained import ADVICE
from ..weight_files import WeightsError, read_state_dict
from ..weights import load_weights

logger = logging.getLogger(__name__)

MIN_STRIDE = 4  # feature maps with smaller strides are not used
TRANSFORMER_MAPS = 4  # number of feature maps of a network whose maps all have the same stride
PROBE_SIZE = (96, 128)  # approximate (height, width) of the test image in `_takes_multiples_of`

torch.fx.wrap("renormalize")  # creates tensors for a dtype and a device, which are unknown in FX tracing


class SynchronizedBatchNormAct2d(SynchronizedBatchNorm2d):
    """Synchronized `timm.layers.BatchNormAct2d`: batch norm followed by dropout and an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


SYNCHRONIZED[BatchNormAct2d] = SynchronizedBatchNormAct2d


class TimmEncoder(nn.Module):
    """A network of timm as encoder.

    Like all encoders, it takes images with ImageNet normalization. It converts them to the normalization with which
    its weights were trained.

    Args:
        name: name of the network with an optional tag of its weights, e.g. `convnext_tiny.in12k_ft_in1k`.
        pretrained: load the weights of timm, which are downloaded if needed.
        weights: file with a state dict of this class, or of the same network of timm; replaces `pretrained`.
        output_stride: stride of the last feature map; None means the default of the network.
        norm_layer: batch norms are synchronized if this function returns a synchronized norm.

    Attributes:
        out_channels: number of channels of each feature map.
        output_stride: stride of the last feature map.
        size_divisor: height and width of images must be multiples of this number.
        mean, std: normalization of the network, for R, G and B values in 0..1; the state dict contains them.

    Raises:
        UserError: the name is unknown, or the network cannot take images of any size, or does not support the output
            stride or `norm_layer`.
        WeightsError: the weights cannot be downloaded, or belong to another network.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        weights: str = "",
        output_stride: int | None = None,
        norm_layer: NormLayer = DEFAULT_NORM,
    ):
        super().__init__()
        norm = norm_layer(1)
        if is_activated(norm):
            raise UserError(f"MODEL.norm inplace: timm:{name} has no in-place norms; set MODEL.norm sync or batch")
        _check_name(name)
        self.architecture = name.partition(".")[0]
        options, self.size_divisor = _find_options(name, output_stride)
        state = read_state_dict(weights) if weights else {}
        is_own = any(key.removeprefix("encoder.").startswith("network.") for key in state)
        if weights and not is_own:
            self.network = _create_from_state(name, options, state, weights)
        else:
            self.network = _create(name, options, pretrained and not weights)
        if getattr(norm, "synchronized", False):
            convert_sync_batchnorm(self.network)
        _mark_blocks(self.network)
        # HRNet also computes maps that decoders of the last map, such as C1, do not use.
        self.has_unused_parameters = self.architecture.startswith("hrnet")
        info = self.network.feature_info
        self.first_map = sum(stride < MIN_STRIDE for stride in info.reduction())
        self.out_channels, self.output_stride = tuple(info.channels()[self.first_map :]), info.reduction()[-1]
        self.mean, self.std = (tuple(self.network.pretrained_cfg[key]) for key in ("mean", "std"))
        if is_own:
            load_weights(self, weights, state=state, name=f"encoder timm:{name}", part="encoder")

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.mean, self.std], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.mean, self.std = map(tuple, state.tolist())

    def stage_of(self, name: str) -> int:
        """Return the group of the parameter with this name according to timm; see `build_optimizer`."""
        return self._groups[_unify_separators(name.removeprefix("network."))]

    @cached_property
    def _groups(self) -> dict[str, int]:
        # The network with its classifier has a group matcher; the names of its parameters contain other separators.
        with torch.device("meta"):
            network = timm.create_model(self.architecture)
        if not hasattr(network, "group_matcher"):
            raise UserError(f"TRAIN.lr_decay: timm does not define the stages of {self.architecture}; set lr_decay 1")
        groups = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
        return {_unify_separators(name): group for name, group in groups.items()}

    def forward(self, x: Tensor, return_feature_maps: bool = False) -> list[Tensor]:
        if (self.mean, self.std) != (IMAGENET_MEAN, IMAGENET_STD):
            x = renormalize(x, self.mean, self.std)
        maps = _to_nchw(self.network(x), self.network)
        return maps[self.first_map :] if return_feature_maps else maps[-1:]


def _unify_separators(name: str) -> str:
    return name.removeprefix("model.").replace("_", ".")


def _check_name(name: str) -> None:
    """Raise a UserError if timm has no network with this name, or no weights with this tag."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(
            f"unknown encoder 'timm:{name}': timm {timm.__version__} has no network {architecture!r}"
            f"{closest(architecture, timm.list_models())}"
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UserError(f"unknown encoder 'timm:{name}': the tags of {architecture} are {', '.join(tags) or 'none'}")


def _find_options(name: str, output_stride: int | None) -> tuple[dict, int]:
    """Return options of `timm.create_model` for images of any size, and the divisor of their height and width."""
    for options in ({}, {"dynamic_img_size": True}):
        network = _create_on_meta(name, options)
        strides = network.feature_info.reduction() if network else []
        if divisor := next((d for d in sorted({1, *strides}) if network and _takes_multiples_of(d, network)), 0):
            break
    else:
        raise UserError(f"timm:{name} has no aligned feature maps for images of any size; choose another network")
    if len(set(strides)) == 1:  # use evenly spaced blocks; by default, timm returns the outputs of the last blocks
        blocks = len(network.feature_info.info)
        options["out_indices"] = [blocks * i // TRANSFORMER_MAPS - 1 for i in range(1, TRANSFORMER_MAPS + 1)]
    if output_stride not in (None, strides[-1]):
        options["output_stride"] = output_stride
        network = _create_on_meta(name, options)
        if not network or network.feature_info.reduction()[-1] != output_stride:
            raise UserError(
                f"MODEL.output_stride {output_stride} is not supported by timm:{name}; set MODEL.output_stride 0 (the "
                f"default of this network, {strides[-1]})"
            )
    return options, divisor


def _create_on_meta(name: str, options: dict) -> nn.Module | None:
    """Create a network without memory for its weights; None if timm does not support the options for this network."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, features_only=True, **options).eval()
    except (TypeError, ValueError, AssertionError, RuntimeError):  # depends on the network
        return None


@torch.no_grad()
def _takes_multiples_of(divisor: int, network: nn.Module) -> bool:
    """Return whether a network on the meta device computes aligned maps of an image whose sides are odd multiples."""
    height, width = (divisor * (side // divisor | 1) for side in PROBE_SIZE)
    try:
        maps = network(torch.empty(1, 3, height, width, device="meta"))
    except (AssertionError, RuntimeError):
        return False
    maps, strides = _to_nchw(maps, network), network.feature_info.reduction()
    return all(x.shape[2] in (height // s, -(-height // s)) for x, s in zip(maps, strides, strict=True))


def _to_nchw(maps: list[Tensor], network: nn.Module) -> list[Tensor]:
    """Permute the feature maps of a network of timm to (N, C, H, W)."""
    channels_last = str(getattr(network, "output_fmt", "")).endswith("NHWC")
    return [x.permute(0, 3, 1, 2) for x in maps] if channels_last else maps


def _create(name: str, options: dict, pretrained: bool) -> nn.Module:
    """Create a network with random or pretrained weights."""
    if not pretrained:
        return timm.create_model(name, features_only=True, **options)
    try:
        network = timm.create_model(name, features_only=True, pretrained=True, **options)
    except Exception as error:  # error of the connection, server or disk, or no weights exist
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"cannot load the weights of timm:{name} ({reason}); {ADVICE}") from None
    config = network.pretrained_cfg
    logger.info("encoder timm:%s: weights %s.%s of timm", name, config["architecture"], config["tag"])
    return network


def _create_from_state(name: str, options: dict, state: Mapping[str, Tensor], path: str) -> nn.Module:
    """Create a network with the weights of a state dict of timm, which was read from `path`.

    timm does not raise an error if entries are missing or belong to further blocks. Missing weights are found by
    creating the network from two random states. Further blocks have names that differ from known ones in numbers only.
    """
    with torch.device("meta"):
        known = timm.create_model(name).state_dict()
    patterns = {re.sub(r"\d+", "0", key) for key in known}
    if further := [key for key in state if key not in known and re.sub(r"\d+", "0", key) in patterns]:
        raise WeightsError(
            f"{path} does not match encoder timm:{name}: unexpected in the file: {shorten_list(further)}"
        )
    networks = []
    for seed in (0, 1):
        overlay = {"state_dict": dict(state)}  # a copy, because timm removes the classifier
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                networks.append(
                    timm.create_model(
                        name, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay, **options
                    )
                )
            except Exception as error:  # depends on the network
                reason = " ".join(str(error).split())[:300]
                raise WeightsError(f"{path} does not match encoder timm:{name}: {reason}") from None
    pairs = zip(networks[0].named_parameters(), networks[1].parameters(), strict=True)
    if missing := [key for (key, first), second in pairs if not torch.equal(first, second)]:
        raise WeightsError(f"{path} does not match encoder timm:{name}: missing in the file: {shorten_list(missing)}")
    networks[0].pretrained_cfg.pop("state_dict", None)
    return networks[0]


def _mark_blocks(network: nn.Module) -> None:
    """Set `is_block` for the modules in lists, e.g. residual blocks; see `lib.nn.compilation.is_block`."""
    containers = nn.Sequential, nn.ModuleList
    for container in (part for part in network.modules() if isinstance(part, containers)):
        for child in container:
            child.is_block = not isinstance(child, containers) and len(list(child.parameters())) > 2
