"""A network for inference: batch norms folded into the convolutions before them, channels last in memory."""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval

from ..lib.nn import InPlaceABN


def fuse_batchnorm(module: nn.Module) -> nn.Module:
    """A copy of a network in eval mode that computes the same with fewer operations, up to rounding.

    A batch norm in eval mode is a scale and a shift per channel, which the convolution before it can do as well.

    Args:
        module: built of `nn.Sequential`s and blocks whose `convN` goes before their `bnN`; parameters of any type.

    Returns:
        The copy, on the same device, for inference only.
    """
    copied = copy.deepcopy(module).eval().requires_grad_(False)
    for parent, conv, norm in list(_pairs(copied)):
        setattr(parent, conv, fuse_conv_bn_eval(getattr(parent, conv), getattr(parent, norm)))
        setattr(parent, norm, nn.Identity())
    return copied.to(memory_format=torch.channels_last)


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(parent, name of the convolution, name of the norm after it)."""
    for parent in module.modules():
        names = dict(parent.named_children())
        if isinstance(parent, nn.Sequential):
            candidates = list(zip(names, list(names)[1:], strict=False))
        else:
            candidates = [(name, f"bn{name.removeprefix('conv')}") for name in names if name.startswith("conv")]
        for conv, norm in candidates:
            if _can_fold(names[conv], names.get(norm)):
                yield parent, conv, norm


def _can_fold(conv: nn.Module, norm: nn.Module | None) -> bool:
    plain = isinstance(norm, _BatchNorm) and not isinstance(norm, InPlaceABN)
    return isinstance(conv, nn.Conv2d) and plain and norm.track_running_stats
