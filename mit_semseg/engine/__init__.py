"""Trainer, losses, optimizers, checkpoints and process groups."""

from .checkpoint import CheckpointError, RunFolder
from .distributed import World
from .losses import MaskedNLLLoss, build_loss
from .optim import build_optimizer, freeze_batch_norm, learning_rates
from .train_step import TrainingOptions
from .trainer import Trainer, TrainingStopped

__all__ = [
    "CheckpointError",
    "MaskedNLLLoss",
    "RunFolder",
    "Trainer",
    "TrainingOptions",
    "TrainingStopped",
    "World",
    "build_loss",
    "build_optimizer",
    "freeze_batch_norm",
    "learning_rates",
]
