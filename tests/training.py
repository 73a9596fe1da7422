"""Train a tiny network through the Python API."""

import math

import torch
from runs import weights
from scenes import options, tiny_module
from torch import nn

from mit_semseg.dataset import TrainDataset
from mit_semseg.engine import MaskedNLLLoss, RunFolder, Trainer, TrainingOptions, build_optimizer, learning_rates

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


def check_layer_wise_learning_rates(encoder: nn.Module) -> None:
    """Check that stages are numbered from the stem on, and that their learning rates have a constant ratio."""
    optimizer = build_optimizer(encoder, tiny_module().decoder, rates=(0.1, 0.2), lr_decay=0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    stages = [round(-math.log2(rates[id(p)] / 0.1)) for p in encoder.parameters()]
    assert sorted(set(stages)) == list(range(max(stages) + 1))
    assert len(set(stages)) >= 5
    assert stages[0] == max(stages)
    assert stages[-1] == 0
    assert learning_rates(optimizer) == {"encoder": 0.1, "decoder": 0.2}
    for group in optimizer.param_groups:
        assert all((p.dim() > 1) == (group["weight_decay"] > 0) for p in group["params"])
