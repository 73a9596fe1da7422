"""State of a training run: what is saved to continue it, bit for bit."""

import torch
from torch import nn

from ..evaluation import AverageMeter
from .checkpoint import CheckpointError, new_history


class Run:
    """Everything of a training run that changes from step to step, and how it is saved and restored.

    Args:
        module: a `SegmentationModule` on `device`.
        optimizer: over its parameters.
        device: where both are.
        scale_loss: scale the loss so that float16 gradients do not underflow.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, *, scale_loss: bool = False
    ):
        self.module, self.optimizer, self.device = module, optimizer, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=scale_loss)
        self.step, self.best, self.history = 0, -1.0, new_history()
        self.loss, self.accuracy = AverageMeter(), AverageMeter()

    def state(self) -> dict:
        """Plain values and tensors from which the run continues bit for bit."""
        cuda = self.device.type == "cuda"
        return {
            "step": self.step,
            "best": self.best,
            "history": self.history,
            "meters": [(m.sum, m.count) if m.initialized else None for m in (self.loss, self.accuracy)],
            "encoder": self.module.encoder.state_dict(),
            "decoder": self.module.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": type(self.optimizer).__name__,
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
        }

    def restore(self, state: dict) -> None:
        """Continue from a `state`.

        Learning rates, momentum and weight decay stay those of this run's options; what the optimizer has gathered
        (momentum buffers) is taken over.

        Raises:
            CheckpointError: the state is of another model or optimizer.
        """
        try:
            self.module.encoder.load_state_dict(state["encoder"])
            self.module.decoder.load_state_dict(state["decoder"])
        except RuntimeError as error:
            raise CheckpointError(
                f"the saved run is of another model ({str(error).splitlines()[-1].strip()}): use its MODEL and "
                f"DATASET.num_class options, or TRAIN.resume restart"
            ) from None
        own, saved = self.optimizer.state_dict(), state["optimizer"]
        sizes = [[len(group["params"]) for group in groups["param_groups"]] for groups in (own, saved)]
        if sizes[0] != sizes[1] or state["optimizer_name"] != type(self.optimizer).__name__:
            raise CheckpointError(
                f"the saved run used {state['optimizer_name']} on {sizes[1]} parameters, this one "
                f"{type(self.optimizer).__name__} on {sizes[0]}: use its TRAIN.optim and TRAIN.fix_bn, or TRAIN.resume "
                f"restart"
            )
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": own["param_groups"]})
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.history = state["step"], state["best"], state["history"]
        for meter, saved in zip((self.loss, self.accuracy), state["meters"], strict=True):
            if saved:
                meter.initialize(saved[0] / saved[1], saved[1])
                meter.sum = saved[0]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
