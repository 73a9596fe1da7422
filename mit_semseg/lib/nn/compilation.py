"""Compile the blocks of a network one by one, so that blocks of equal structure are compiled once."""

from inspect import signature

import torch
from torch import nn

# The default limit is 8 kinds of blocks, but MobileNetV2 has more. Before PyTorch 2.14, the others are not compiled.
LIMIT = {"recompile_limit": 64} if "recompile_limit" in signature(torch.compile).parameters else {}
# Without this option, the backward pass of a convolution would be compiled for every image size.
LAYOUT = {"force_layout_optimization": True}


def compile_blocks(module: nn.Module) -> int:
    """Compile the innermost blocks whose class sets `is_block = True`; a module without blocks is compiled as a whole.

    Batch size, height and width are dynamic: inputs of another size need no compilation if they have channels last
    memory. Return the number of compiled modules.
    """
    blocks = [part for part in module.modules() if is_block(part) and not any(map(is_block, list(part.modules())[1:]))]
    for part in blocks or [module]:
        part.compile(dynamic=True, options=LAYOUT, **LIMIT)
    return max(1, len(blocks))


def is_block(module: nn.Module) -> bool:
    """Return whether a module is a block, e.g. a residual block, which can be recomputed or compiled separately."""
    return getattr(module, "is_block", False)
