"""Fuse batch norms into the preceding convolutions, for inference."""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from ..lib.nn import SynchronizedBatchNorm2d
from .layers import DilatedDepthwiseConv2d, SameConv2d

# Subclasses are not fused, because they can do more, e.g. apply an activation or standardize the weights.
CONVOLUTIONS = nn.Conv2d, SameConv2d, DilatedDepthwiseConv2d
NORMS = nn.BatchNorm2d, SynchronizedBatchNorm2d


def fuse_batchnorm(module: nn.Module) -> nn.Module:
    """Return an inference copy of `module` in channels_last memory format, with batch norms fused into convolutions.

    A batch norm is fused if it follows a convolution in an `nn.Sequential`, or if they are named `bnN` and `convN` in a
    class of this package.
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
        if type(parent) is nn.Sequential:
            pairs = list(zip(children, list(children)[1:], strict=False))
        elif type(parent).__module__.startswith(f"{__package__}."):
            pairs = [(name, f"bn{name.removeprefix('conv')}") for name in children if name.startswith("conv")]
        else:
            continue
        for conv, norm in pairs:
            layer = children.get(norm)
            if type(children[conv]) in CONVOLUTIONS and type(layer) in NORMS and layer.track_running_stats:
                yield parent, conv, norm
