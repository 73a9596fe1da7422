"""Training: the loop, the losses, the optimizer, checkpoints."""

from .checkpoint import CheckpointError, RunFolder
from .distributed import Processes
from .loop import fit
from .losses import MaskedNLLLoss, build_loss
from .optim import build_optimizer, freeze_batch_norm, learning_rates
from .run import Settings
from .step import settle, train_step

__all__ = [
    "CheckpointError",
    "MaskedNLLLoss",
    "Processes",
    "RunFolder",
    "Settings",
    "build_loss",
    "build_optimizer",
    "fit",
    "freeze_batch_norm",
    "learning_rates",
    "settle",
    "train_step",
]
