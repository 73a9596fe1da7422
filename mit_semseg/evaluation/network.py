"""A network as inference runs it: norms folded, in the precision that was asked for, compiled if wanted."""

import logging
import platform
from pathlib import Path

import torch
from torch import nn

from ..lib.utils import UserError
from ..models.folding import folded

logger = logging.getLogger(__name__)

PRECISIONS = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What processors call their bfloat16 instructions (x86, and 64-bit Arm) in Linux' list of them.
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def prepared(
    module: nn.Module, device: torch.device | str = "cpu", *, precision: str = "auto", compiled: bool = False
) -> nn.Module:
    """A copy of a network for inference.

    Args:
        module: a `SegmentationModule` on the device.
        device: where it is.
        precision: of weights and feature maps, one of `PRECISIONS`; class scores come out as float32 in any case.
        compiled: the encoder by `torch.compile`, at the first picture of every size: seconds to a minute each.

    Raises:
        UserError: float16 on a CPU.
    """
    kind = torch.device(device).type
    if precision == "fp16" and kind == "cpu":
        raise UserError("INFERENCE.precision fp16 needs a GPU; on the CPU set bf16 (where it has it), or auto")
    if precision == "bf16" and kind == "cpu" and not cpu_has_bfloat16():
        logger.warning("INFERENCE.precision bf16: this processor has no bfloat16 instructions; auto will be faster")
    network = folded(module)
    if PRECISIONS[precision] != torch.float32:
        logger.info("inference in %s: some pixels may get another class than in float32", precision)
        network.to(PRECISIONS[precision]).input_dtype = PRECISIONS[precision]
    if compiled:
        network.encoder.compile()  # nearly all of the work; the pyramid's cached matrices would be made anew each time
    return network


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 numbers itself (Linux; assumed elsewhere on Arm alone)."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.machine() == "arm64"
    words = {
        word
        for line in path.read_text().splitlines()
        if line.startswith(("flags", "Features"))
        for word in line.split()
    }
    return bool(words & _BFLOAT16_FLAGS)
