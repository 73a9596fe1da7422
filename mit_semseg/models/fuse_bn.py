"""Fuse batch norms into the preceding convolutions, for inference."""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval

from ..lib.nn import InPlaceABN


def fuse_batchnorm(module: nn.Module) -> nn.Module:
    """Return an inference copy of `module` in channels_last memory format, with batch norms fused into convolutions.

    A batch norm is fused if it follows a convolution in an `nn.Sequential`, or if they are named `bnN` and `convN`.
    """
    fused = copy.deepcopy(module).eval().requires_grad_(False)
    for parent, conv, norm in list(_conv_norm_pairs(fused)):
        setattr(parent, conv, fuse_conv_bn_eval(getattr(parent, conv), getattr(parent, norm)))
        setattr(parent, norm, nn.Identity())
    return fused.to(memory_format=torch.channels_last)


def _conv_norm_pairs(module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield (parent module, name of a convolution, name of the batch norm applied to its output)."""
    for parent in module.modules():
        children = dict(parent.named_children())
        if isinstance(parent, nn.Sequential):
            pairs = list(zip(children, list(children)[1:], strict=False))
        else:
            pairs = [(name, f"bn{name.removeprefix('conv')}") for name in children if name.startswith("conv")]
        for conv, norm in pairs:
            layer = children.get(norm)
            can_fuse = isinstance(layer, _BatchNorm) and not isinstance(layer, InPlaceABN) and layer.track_running_stats
            if can_fuse and isinstance(children[conv], nn.Conv2d):
                yield parent, conv, norm
