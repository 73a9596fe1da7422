"""Create optimizers, compute the learning rate schedule, and freeze batch norms."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..models.builder import lookup
from .train_step import TrainingOptions

OPTIMIZERS = {
    "SGD": lambda groups, beta1: torch.optim.SGD(groups, momentum=beta1, fused=True),
    "AdamW": lambda groups, beta1: torch.optim.AdamW(groups, betas=(beta1, 0.999), fused=True),
}


def build_optimizer(
    encoder: nn.Module,
    decoder: nn.Module,
    name: str = "SGD",
    *,
    rates: tuple[float, float] = (0.02, 0.02),
    beta1: float = 0.9,
    weight_decay: float = 1e-4,
) -> torch.optim.Optimizer:
    """Return an optimizer for the parameters of encoder and decoder.

    Args:
        name: a key of `OPTIMIZERS`.
        rates: initial learning rates of encoder and decoder.
        beta1: momentum of SGD, or beta1 of AdamW.
        weight_decay: weight decay of convolution and linear weights; it is 0 for norms and biases.

    Raises:
        ValueError: the name is unknown, or all parameters are frozen.
    """
    groups = []
    for part, module, lr in zip(("encoder", "decoder"), (encoder, decoder), rates, strict=True):
        parameters = [p for p in module.parameters() if p.requires_grad]
        matrices, vectors = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
        for decay, group in ((weight_decay, matrices), (0.0, vectors)):
            if group:
                groups.append({"params": group, "lr": lr, "initial_lr": lr, "weight_decay": decay, "part": part})
    if not groups:
        raise ValueError("all parameters of encoder and decoder are frozen; set requires_grad True for some parameters")
    return lookup(OPTIMIZERS, name, "optimizer")(groups, beta1)


def lr_factor(step: int, options: TrainingOptions) -> float:
    """Return the factor by which initial learning rates are multiplied at `step`.

    The factor is a linear warmup over `warmup_iters` steps times the polynomial schedule
    (1 - step / total_steps) ** lr_pow of Chen et al., "DeepLab", 2016.
    """
    warmup = min(1.0, (step + 1) / options.warmup_iters) if options.warmup_iters else 1.0
    return warmup * max(0.0, 1 - step / options.total_steps) ** options.lr_pow


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to `factor` times its initial learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the current learning rates with the keys `encoder` and `decoder`; a frozen part has no key."""
    return {group["part"]: group["lr"] for group in optimizer.param_groups}


def freeze_batch_norm(module: nn.Module) -> None:
    """Freeze running statistics and parameters of all batch norms; `module.train()` does not unfreeze them."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval()
            part.requires_grad_(False)
            part.train = _stay_in_eval.__get__(part)


def _stay_in_eval(self: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(self, False)
