"""Training: the loop, the loss, the optimizer, checkpoints."""

from .checkpoint import CheckpointError, RunFiles
from .loop import Settings, fit, train_step
from .losses import MaskedNLLLoss
from .optim import build_optimizer, freeze_batch_norm, learning_rates

__all__ = [
    "CheckpointError",
    "MaskedNLLLoss",
    "RunFiles",
    "Settings",
    "build_optimizer",
    "fit",
    "freeze_batch_norm",
    "learning_rates",
    "train_step",
]
