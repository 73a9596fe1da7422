"""Building blocks that encoders and decoders share."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lib.nn import InPlaceABN, InPlaceABNSync, SynchronizedBatchNorm2d

NormLayer = Callable[[int], nn.Module]
# The divisor sqrt(var + eps) everywhere: on one device, on many, and in evaluation.
DEFAULT_NORM: NormLayer = partial(SynchronizedBatchNorm2d, clamp_variance=False)
LEAKY_SLOPE = 0.01  # of leaky ReLU, in the Cityscapes toolbox's heads and in place of ReLU in in-place norms
NORMS: dict[str, NormLayer] = {
    "batch": partial(SynchronizedBatchNorm2d, clamp_variance=False, synchronized=False),
    "sync": DEFAULT_NORM,
    "inplace": partial(InPlaceABNSync, slope=LEAKY_SLOPE),
}
POOL_SCALES = (1, 2, 3, 6)  # bins per side of the pyramid, Zhao et al., "Pyramid Scene Parsing Network", 2017


def conv_bn_relu(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    bias: bool = False,
    activation: str = "relu",
    norm_layer: NormLayer = DEFAULT_NORM,
) -> nn.Sequential:
    """Convolution ("same" padding), normalization and ReLU or another activation; state-dict keys `0`, `1`."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias),
        *norm_act(norm_layer, out_channels, activation),
    )


def norm_act(norm_layer: NormLayer, channels: int, activation: str = "relu") -> tuple[nn.Module, nn.Module]:
    """Normalization and the activation after it.

    An in-place norm with an activation of its own takes the place of both (leaky ReLU instead of ReLU: see
    `InPlaceABN`); the second is then the identity.

    Args:
        activation: 'relu', 'leaky_relu', or 'relu6', which no norm takes the place of.
    """
    norm = norm_layer(channels) if activation != "relu6" else plain_norm(norm_layer, channels)
    if is_activated(norm):
        return norm, nn.Identity()
    inplace = not isinstance(norm, InPlaceABN)  # whose output is kept and must not be written over
    if activation == "leaky_relu":
        return norm, nn.LeakyReLU(LEAKY_SLOPE, inplace=inplace)
    return norm, (nn.ReLU6 if activation == "relu6" else nn.ReLU)(inplace=inplace)


def plain_norm(norm_layer: NormLayer, channels: int) -> nn.Module:
    """Normalization that no activation follows."""
    norm = norm_layer(channels)
    return norm.without_activation() if is_activated(norm) else norm


def is_activated(norm: nn.Module) -> bool:
    """Whether a norm has its activation in it."""
    return isinstance(norm, InPlaceABN) and norm.activation != "none"


def norm_add_relu(norm: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
    """ReLU of the normalized `x` plus a shortcut; a norm that is activated does it all."""
    return norm(x, shortcut) if is_activated(norm) else F.relu(norm(x) + shortcut, inplace=True)


def pooling_branches(
    channels: int, width: int, norm_layer: NormLayer = DEFAULT_NORM, *, activation: str = "relu"
) -> nn.ModuleList:
    """The branches of pyramid pooling: averages over 1, 4, 9 and 36 regions, each through a 1x1 convolution."""
    convs = (conv_bn_relu(channels, width, 1, activation=activation, norm_layer=norm_layer) for _ in POOL_SCALES)
    return nn.ModuleList(
        nn.Sequential(AveragePooling(bins), *conv) for bins, conv in zip(POOL_SCALES, convs, strict=True)
    )


class AveragePooling(nn.Module):
    """Means over a grid of regions, see `average_pool`.

    Args:
        bins: regions per side.
    """

    def __init__(self, bins: int):
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, bins, bins)."""
        return average_pool(x, self.bins)

    def extra_repr(self) -> str:
        """For printing the module."""
        return str(self.bins)


def average_pool(x: Tensor, bins: int) -> Tensor:
    """`F.adaptive_avg_pool2d(x, bins)` as two products with small matrices: deterministic on every device, and made of
    what every format of networks has.

    Args:
        x: (N, C, H, W).
        bins: regions per side; neighbours share a row or column where it does not go into the side.

    Returns:
        (N, C, bins, bins).
    """
    n, c, height, width = x.shape
    symbolic = is_symbolic(height, width)
    averages = _averages if symbolic else _cached_averages
    rows, columns = (averages(side, bins, x.device).to(x.dtype) for side in (height, width))
    if symbolic or x.is_contiguous():
        return rows @ (x @ columns.T)
    x = x.permute(0, 2, 3, 1)  # channels last in memory: the channels of a row of pixels are the columns of a product
    x = (rows @ x.reshape(n, height, width * c)).view(n, bins, width, c)
    return (columns @ x).permute(0, 3, 1, 2)


def _averages(side: int, bins: int, device: torch.device) -> Tensor:
    """What every position counts in the mean of every region: (bins, side) float64."""
    numbers, places = torch.arange(bins, device=device), torch.arange(side, device=device)
    start, stop = (numbers * side // bins)[:, None], (((numbers + 1) * side + bins - 1) // bins)[:, None]
    return ((places >= start) & (places < stop)).double() / (stop - start)


@lru_cache(maxsize=64)  # some KB each
def _cached_averages(side: int, bins: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode could not be used in training
        place = torch.device("cpu") if device.type == "mps" else device
        return on_device(_averages(side, bins, place), device)


def on_device(matrix: Tensor, device: torch.device) -> Tensor:
    """A float64 matrix on a device, in float32 on Apple's GPUs, which know no other."""
    return matrix.float().to(device) if device.type == "mps" else matrix.to(device)


def at_least_float32(x: Tensor) -> Tensor:
    """16-bit scores as float32: what comes after them (resizing, softmax, sums) would be too coarse."""
    return x.float() if x.dtype.itemsize < 4 else x


def is_symbolic(*sizes: int) -> bool:
    """Whether a size is not known yet, in a network that is being exported: what depends on it is made by operators."""
    return any(type(size) is not int for size in sizes)


def resize(x: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Bilinear resize of (N, C, H, W) to (N, C, *size).

    Args:
        align_corners: the centres of the corner pixels keep their places, as in PyTorch before 0.4; else their outer
            corners do.
    """
    if not is_symbolic(*x.shape[-2:], *size) and x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def dilation_of_stage(stride: int, current_stride: int, output_stride: int) -> tuple[int, int, int]:
    """Turn strides into dilation once the wanted output stride is reached.

    Args:
        stride: stride the stage has in the undilated network.
        current_stride: stride of its input in the undilated network, relative to the picture.
        output_stride: largest stride allowed.

    Returns:
        (stride, dilation of the convolution that would have been strided, dilation of the others): in the first block
        of a dilated stage the strided convolution still sees its input at the previous stage's spacing.
    """
    before = max(1, current_stride // output_stride)
    after = max(1, current_stride * stride // output_stride)
    return stride * before // after, before, after


def dilate(stages: Sequence[nn.Module], output_stride: int) -> None:
    """Replace the strides of a network's last two stages by dilation.

    Args:
        stages: with output strides 16 and 32.
        output_stride: of the network afterwards, 8 or 16.

    Raises:
        ValueError: another output stride.
    """
    if output_stride not in (8, 16):
        raise ValueError(f"output stride {output_stride}: choose 8 or 16")
    for stage, current in zip(stages, (8, 16), strict=True):
        stride, first, others = dilation_of_stage(2, current, output_stride)
        for conv in (part for part in stage.modules() if isinstance(part, nn.Conv2d)):
            dilation = first if conv.stride == (2, 2) else others
            if conv.stride == (2, 2):
                conv.stride = (stride, stride)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (dilation, dilation)


def init_weights(module: nn.Module, *, mode: str = "fan_in", norm_bias: float = 0.0) -> None:
    """Kaiming-normal convolutions (He et al., 2015), zero biases, norms with weight 1 and the given bias.

    Args:
        mode: 'fan_in' for decoders: a classifier of few classes then starts near the loss of equal probabilities, where
            'fan_out' would scale its weights by their number. 'fan_out' for encoders, as in the ResNet paper.
        norm_bias: initial bias of the norms.
    """
    for part in module.modules():
        init_layer(part, mode, norm_bias)


def init_layer(part: nn.Module, mode: str, norm_bias: float) -> None:
    """`init_weights` for a single layer."""
    if isinstance(part, nn.Conv2d):
        nn.init.kaiming_normal_(part.weight, mode=mode, nonlinearity="relu")
        if part.bias is not None:
            nn.init.zeros_(part.bias)
    elif isinstance(part, nn.modules.batchnorm._BatchNorm) and part.affine:
        nn.init.ones_(part.weight)
        nn.init.constant_(part.bias, norm_bias)
