"""Create optimizers, compute the learning rate schedule, and freeze batch norms."""

import math
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..lib.utils import UserError
from ..models.builder import lookup
from .train_step import TrainingOptions


def _sgd(groups: list[dict], beta1: float) -> torch.optim.SGD:
    """Return SGD with zero momentum. In a skipped first update, fused SGD would leave its momentum uninitialized."""
    optimizer = torch.optim.SGD(groups, momentum=beta1, fused=True)
    for parameter in (parameter for group in groups for parameter in group["params"] if beta1):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


OPTIMIZERS = {
    "SGD": _sgd,
    "AdamW": lambda groups, beta1: torch.optim.AdamW(groups, betas=(beta1, 0.999), fused=True),
}


def build_optimizer(
    encoder: nn.Module,
    decoder: nn.Module,
    name: str = "SGD",
    *,
    rates: tuple[float, float] = (0.02, 0.02),
    lr_decay: float = 1.0,
    beta1: float = 0.9,
    weight_decay: float = 1e-4,
) -> torch.optim.Optimizer:
    """Return an optimizer for the parameters of encoder and decoder.

    Args:
        name: a key of `OPTIMIZERS`.
        rates: initial learning rates of encoder and decoder. A part with learning rate 0 is left out.
        lr_decay: factor between the initial learning rates of successive stages of the encoder (layer-wise learning
            rate decay, Clark et al., "ELECTRA", 2020). The last stage has the learning rate in `rates`.
        beta1: momentum of SGD, or beta1 of AdamW.
        weight_decay: weight decay of convolution and linear weights; it is 0 for norms and biases.

    Raises:
        ValueError: the name is unknown, or all parameters are frozen.
        UserError: there is an `lr_decay`, but the encoder does not define its stages.
    """
    if lr_decay < 1 and not hasattr(encoder, "stage_of"):
        raise UserError(f"TRAIN.lr_decay {lr_decay}: {type(encoder).__name__} has no method stage_of; set lr_decay 1")
    groups = []
    for part, module, rate in zip(("encoder", "decoder"), (encoder, decoder), rates, strict=True):
        stage_of = encoder.stage_of if lr_decay < 1 and part == "encoder" else lambda name: 0
        parameters: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for key, parameter in module.named_parameters() if rate else ():
            if parameter.requires_grad:
                parameters.setdefault((stage_of(key), parameter.dim() <= 1), []).append(parameter)
        last = max((stage for stage, _ in parameters), default=0)
        for (stage, is_vector), group in sorted(parameters.items(), key=lambda item: item[0]):
            lr, decay = rate * lr_decay ** (last - stage), 0.0 if is_vector else weight_decay
            groups.append({"params": group, "lr": lr, "initial_lr": lr, "weight_decay": decay, "part": part})
    if not groups:
        raise ValueError("all parameters of encoder and decoder are frozen; set requires_grad True for some parameters")
    return lookup(OPTIMIZERS, name, "optimizer")(groups, beta1)


def lr_factor(step: int, options: TrainingOptions) -> float:
    """Return the factor by which initial learning rates are multiplied at `step`.

    The factor is a linear warmup over `warmup_iters` steps times the schedule. With t = step / total_steps, `poly` is
    (1 - t) ** lr_pow (Chen et al., "DeepLab", 2016), and `cosine` is (1 + cos(pi t)) / 2 (Loshchilov & Hutter, "SGDR",
    2017).
    """
    warmup = min(1.0, (step + 1) / options.warmup_iters) if options.warmup_iters else 1.0
    done = min(1.0, step / options.total_steps)
    if options.schedule == "cosine":
        return warmup * (1 + math.cos(math.pi * done)) / 2
    return warmup * (1 - done) ** options.lr_pow


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to `factor` times its initial learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the current learning rates with the keys `encoder` (its last stage) and `decoder`.

    A part with learning rate 0 has no key.
    """
    return {group["part"]: group["lr"] for group in optimizer.param_groups}


def freeze_batch_norm(module: nn.Module) -> None:
    """Freeze running statistics and parameters of all batch norms; `module.train()` does not unfreeze them."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval()
            part.requires_grad_(False)
            part.train = partial(_stay_in_eval, part)  # a bound method could not be unpickled


def _stay_in_eval(self: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(self, False)
