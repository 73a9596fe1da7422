"""A network as inference runs it: norms folded, in the precision that was asked for, compiled if wanted."""

import copy
import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..lib.utils import UserError
from ..models.fuse_bn import fuse_batchnorm

logger = logging.getLogger(__name__)

Model = Callable[..., Tensor]  # module({"img_data": (1, 3, h, w)}, segSize=(H, W)) -> probabilities (1, C, H, W)

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
        UserError: float16 on a CPU, or bfloat16 on a GPU that does not support it.
    """
    kind = torch.device(device).type
    if precision == "fp16" and kind == "cpu":
        raise UserError("INFERENCE.precision fp16 needs a GPU; on the CPU set bf16 (where it has it), or auto")
    if precision == "bf16" and lacks_bfloat16(device):
        raise UserError(f"INFERENCE.precision bf16: {device} does not support bfloat16; set fp16 or auto")
    if precision == "bf16" and kind == "cpu" and not cpu_has_bfloat16():
        logger.warning("INFERENCE.precision bf16: this processor has no bfloat16 instructions; auto will be faster")
    network = fuse_batchnorm(module)
    if PRECISIONS[precision] != torch.float32:
        logger.info("inference in %s: some pixels may get another class than in float32", precision)
        _to_16_bits(network, PRECISIONS[precision])
    if compiled:
        network.encoder.compile()  # nearly all of the work; the pyramid's cached matrices would be made anew each time
    return network


class _InFloat32(nn.Module):
    """A layer that works in float32, whatever comes, and what it gives in a type of choice."""

    def __init__(self, layer: nn.Module, output: torch.dtype):
        super().__init__()
        self.layer, self.output = layer.float(), output

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float()).to(self.output)


def _to_16_bits(network: nn.Module, dtype: torch.dtype) -> None:
    """Bring a network to a type of 16 bits, but for two layers of little work and much weight.

    The first sees pictures as they are: rounded to 8 bits of mantissa, a colour would be off at all of its pixels
    alike. The last makes scores in 32 bits: of 16, they would be equal where two classes are close.
    """
    first = _convolutions(network.encoder)[0]
    last = f"conv_last.{_convolutions(network.decoder.conv_last)[-1]}".rstrip(".")
    kept = [
        (part, name, _InFloat32(copy.deepcopy(part.get_submodule(name)), output))
        for part, name, output in ((network.encoder, first, dtype), (network.decoder, last, torch.float32))
    ]
    network.to(dtype)
    for part, name, layer in kept:
        part.set_submodule(name, layer)


def _convolutions(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, nn.Conv2d)]


def lacks_bfloat16(device: torch.device | str) -> bool:
    """Whether a device is a GPU without bfloat16 arithmetic."""
    if torch.device(device).type != "cuda":
        return False
    with torch.cuda.device(device):
        return not torch.cuda.is_bf16_supported(including_emulation=False)


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


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Disable TF32 in cuDNN's convolutions; the previous setting is restored, others are not changed.

    PyTorch 2.9 replaced `allow_tf32` by `fp32_precision`, and raises an error where the old switch is read after the
    new one was set.
    """
    cudnn = torch.backends.cudnn
    new, old = ("fp32_precision", "ieee"), ("allow_tf32", False)
    switch, (name, strict) = (cudnn.conv, new) if hasattr(cudnn, "conv") else (cudnn, old)
    before = getattr(switch, name)
    setattr(switch, name, strict)
    try:
        yield
    finally:
        setattr(switch, name, before)


@dataclass(frozen=True)
class InferenceOptions:
    """How a network looks at a picture, beside its scales.

    Attributes:
        flip: also mirrored left to right; both count the same.
        window: (height, width) of the regions that go through the network one by one; None takes the whole picture.
        overlap: share of a window that the next one covers again, at least, in 0..1 (below 1).
        precision: of the network, see `PRECISIONS`. `fp32` is strict: on NVIDIA GPUs `auto` multiplies in
            convolutions as PyTorch does by default, with inputs rounded to 10 bits (TF32).
        compiled: the encoder, by `torch.compile`.
    """

    flip: bool = False
    window: tuple[int, int] | None = None
    overlap: float = 1 / 3
    precision: str = "auto"
    compiled: bool = False

    def network(self, module: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
        """A copy of a module that looks at pictures this way, see `prepared`."""
        return prepared(module, device, precision=self.precision, compiled=self.compiled)

    def arithmetic(self, device: torch.device | str) -> AbstractContextManager:
        """Context in which the network is to run."""
        if self.precision == "fp32" and torch.device(device).type == "cuda":
            return _without_tf32()
        return nullcontext()


DEFAULT_INFERENCE = InferenceOptions()
