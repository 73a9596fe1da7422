"""Compile the blocks of a network one by one, so that blocks of equal structure are compiled once."""

from inspect import signature

import torch
from torch import nn

# By default, torch.compile compiles a function at most 8 times, but MobileNetV2 has more than 8 different blocks.
# PyTorch before 2.14 has no argument for this limit, so the remaining blocks are not compiled.
RECOMPILE_LIMIT = {"recompile_limit": 64} if "recompile_limit" in signature(torch.compile).parameters else {}
# Without this option, the backward pass of a convolution would be compiled for every image size.
INDUCTOR_OPTIONS = {"force_layout_optimization": True}


def compile_blocks(module: nn.Module) -> int:
    """Compile the innermost blocks whose class sets `is_block = True`; a module without blocks is compiled as a whole.

    Batch size, height and width are dynamic, but batch size 1 is compiled separately. Inputs must have the
    channels_last memory format; otherwise, each input size can cause a recompilation. Return the number of compiled
    modules.
    """
    blocks = [part for part in module.modules() if is_block(part) and not any(map(is_block, list(part.modules())[1:]))]
    for part in blocks or [module]:
        part.compile(dynamic=True, options=INDUCTOR_OPTIONS, **RECOMPILE_LIMIT)
    return max(1, len(blocks))


def is_block(module: nn.Module) -> bool:
    """Return whether a module is a block, e.g. a residual block, which can be recomputed or compiled separately."""
    return getattr(module, "is_block", False)
