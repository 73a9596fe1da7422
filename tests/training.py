"""Train a tiny network through the Python API."""

import torch
from runs import weights
from scenes import options, tiny_module
from torch import nn

from mit_semseg.dataset import TrainDataset
from mit_semseg.engine import MaskedNLLLoss, RunFolder, Trainer, TrainingOptions, build_optimizer

CPU = torch.device("cpu")


def make_trainer(folder, *, module=None, world=None, optimizer=None, **changes) -> Trainer:
    """Return a trainer of a tiny network; `changes` are arguments of `TrainingOptions`."""
    module = module or tiny_module(crit=MaskedNLLLoss())
    optimizer = optimizer or build_optimizer(module.encoder, module.decoder, rates=(0.05, 0.05))
    training = TrainingOptions(**{"num_epoch": 2, "epoch_iters": 4, "disp_iter": 2, **changes})
    return Trainer(module, optimizer, RunFolder(folder), training, world)


def run(root, folder, *, seed=0, dataset=None, training=None, **fit):
    """Train a tiny network with dropout; return the trainer and the weights of the last epoch."""
    module = tiny_module(crit=MaskedNLLLoss(), seed=seed)
    module.decoder.cbr.append(nn.Dropout2d(0.2))  # makes training depend on the random state
    trainer = make_trainer(folder, module=module, **(training or {}))
    trainer.fit(dataset or TrainDataset(root, "train", options(), batch_per_gpu=2), **fit)
    return trainer, weights(folder, f"epoch_{trainer.options.num_epoch}.pth")
