"""Activation checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016)."""

from contextlib import nullcontext
from functools import cache

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .batchnorm import recomputation
from .compilation import is_block


class _Checkpointed:
    """Mixin for a block: in training, save only its inputs, and recompute the block in the backward pass."""

    activation_checkpointing = True

    def forward(self, *args, **kwargs):
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        contexts = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), recomputation())}
        return checkpoint(super().forward, *args, **contexts, **kwargs)


@cache
def _checkpointed_class(block_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"Checkpointed{block_class.__name__}", (_Checkpointed, block_class), {})


def enable_activation_checkpointing(module: nn.Module) -> int:
    """Enable activation checkpointing in the outermost blocks whose class sets `is_block = True`.

    The class of each block is replaced by a subclass; state-dict keys do not change. Return the number of these blocks.
    """
    if is_block(module):
        if not isinstance(module, _Checkpointed):
            module.__class__ = _checkpointed_class(type(module))
        return 1
    return sum(enable_activation_checkpointing(child) for child in module.children())
