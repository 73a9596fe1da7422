"""Blocks whose insides are computed again in the backward pass instead of being kept (Chen et al., "Training Deep Nets
with Sublinear Memory Cost", 2016)."""

from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .batchnorm import recomputation


class Blocks(nn.Sequential):
    """Modules one after the other, as `nn.Sequential`.

    Attributes:
        recomputed: in training, keep the input of every module only.
    """

    recomputed = False

    def forward(self, x):
        """The output of the last module."""
        for block in self:
            x = self.through(block, x)
        return x

    def through(self, block: nn.Module, x):
        """The output of one of the modules."""
        if not (self.recomputed and self.training and torch.is_grad_enabled()):
            return block(x)
        return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputation()))


def enable_activation_checkpointing(module: nn.Module) -> int:
    """Let all `Blocks` of a module recompute, but for those inside of others.

    Returns:
        How many there are.
    """
    if isinstance(module, Blocks):
        module.recomputed = True
        return 1
    return sum(enable_activation_checkpointing(child) for child in module.children())
