"""Optimizers and the learning rate schedule."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

OPTIMIZERS = ("SGD", "AdamW")


def build_optimizer(
    encoder: nn.Module,
    decoder: nn.Module,
    *,
    name: str = "SGD",
    lr_encoder: float = 0.02,
    lr_decoder: float = 0.02,
    beta1: float = 0.9,
    weight_decay: float = 1e-4,
) -> torch.optim.Optimizer:
    """One optimizer over encoder and decoder, with their own learning rates; one kernel updates many parameters.

    Weight decay acts on convolution and linear weights only, i.e. on parameters with two dimensions or more.

    Args:
        name: 'SGD' (momentum `beta1`) or 'AdamW' (betas `beta1`, 0.999).

    Raises:
        ValueError: another name, or nothing to train.
    """
    groups = []
    for part, module, lr in (("encoder", encoder, lr_encoder), ("decoder", decoder, lr_decoder)):
        parameters = [p for p in module.parameters() if p.requires_grad]
        for decay, chosen in (
            (weight_decay, [p for p in parameters if p.dim() > 1]),
            (0.0, [p for p in parameters if p.dim() <= 1]),
        ):
            if chosen:
                groups.append({"params": chosen, "lr": lr, "initial_lr": lr, "weight_decay": decay, "part": part})
    if not groups:
        raise ValueError("no parameter to train: everything is frozen")
    if name == "SGD":
        return torch.optim.SGD(groups, lr=lr_encoder, momentum=beta1, fused=True)
    if name == "AdamW":
        return torch.optim.AdamW(groups, lr=lr_encoder, betas=(beta1, 0.999), fused=True)
    raise ValueError(f"optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}")


def schedule(step: int, total: int, power: float = 0.9, warmup: int = 0) -> float:
    """Factor of the learning rates at step `step` of `total`: linear rise over `warmup` steps, times the poly decay
    (1 - step / total) ** power of Chen et al., "DeepLab", 2016."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return rise * max(0.0, 1 - step / total) ** power


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its initial one."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Current learning rate of `encoder` and `decoder` (those that are trained)."""
    return {group["part"]: group["lr"] for group in optimizer.param_groups}


def freeze_batch_norm(module: nn.Module) -> None:
    """Freeze statistics and parameters of every batch norm; nothing else (dropout stays as it is).

    The norms stay frozen through later calls of `.train()`.
    """
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval()
            part.requires_grad_(False)
            part.train = _stay_in_eval.__get__(part)


def _stay_in_eval(self: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(self, False)
