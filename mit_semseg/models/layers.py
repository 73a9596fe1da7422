"""Building blocks shared by encoders and decoders."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lib.nn import InPlaceABN, InPlaceABNSync, SynchronizedBatchNorm2d

NormLayer = Callable[[int], nn.Module]  # number of channels -> normalization layer
# clamp_variance=False divides by sqrt(var + eps) in training and evaluation, on one device and on many.
DEFAULT_NORM: NormLayer = partial(SynchronizedBatchNorm2d, clamp_variance=False)
LEAKY_SLOPE = 0.01  # negative slope of leaky ReLU
NORMS: dict[str, NormLayer] = {
    "batch": partial(SynchronizedBatchNorm2d, clamp_variance=False, synchronized=False),
    "sync": DEFAULT_NORM,
    "inplace": partial(InPlaceABNSync, slope=LEAKY_SLOPE),
}
ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": partial(nn.LeakyReLU, LEAKY_SLOPE)}
POOL_SCALES = (1, 2, 3, 6)  # bins per side in pyramid pooling (Zhao et al., "Pyramid Scene Parsing Network", 2017)


def conv2d(
    in_channels: int, out_channels: int, kernel_size: int, *, stride=1, dilation=1, groups=1, bias=False
) -> nn.Conv2d:
    """Return a convolution with "same" padding (for stride 1), without bias by default."""
    padding = dilation * (kernel_size // 2)
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel_size: int = 3, *, norm_layer=DEFAULT_NORM, activation="relu", **options
) -> nn.Sequential:
    """Return convolution, normalization and activation; see `conv2d` for `options` and `norm_act` for `activation`."""
    conv = conv2d(in_channels, out_channels, kernel_size, **options)
    return nn.Sequential(conv, *norm_act(norm_layer, out_channels, activation))


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int, *, norm_layer: NormLayer, **options
) -> nn.Sequential:
    """Return convolution and normalization, without activation; see `conv2d` for `options`."""
    norm = norm_layer(out_channels)
    norm = norm.without_activation() if is_activated(norm) else norm
    return nn.Sequential(conv2d(in_channels, out_channels, kernel_size, **options), norm)


def norm_act(norm_layer: NormLayer, channels: int, activation: str = "relu") -> tuple[nn.Module, nn.Module]:
    """Return a normalization layer and the activation that follows it; `activation` is a name in `ACTIVATIONS`.

    An in-place norm with an activation replaces ReLU and leaky ReLU; the second module is then `nn.Identity`.
    """
    norm = norm_layer(channels)
    if is_activated(norm) and activation == "relu6":
        norm = norm.without_activation()
    if is_activated(norm):
        return norm, nn.Identity()
    inplace = not isinstance(norm, InPlaceABN)  # the backward pass of InPlaceABN needs its output
    return norm, ACTIVATIONS[activation](inplace=inplace)


def is_activated(norm: nn.Module) -> bool:
    """Return whether a normalization layer also applies an activation."""
    return isinstance(norm, InPlaceABN) and norm.activation != "none"


def norm_add_relu(norm: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
    """Return relu(norm(x) + shortcut); an in-place norm replaces ReLU by its activation."""
    return norm(x, shortcut) if is_activated(norm) else F.relu(norm(x) + shortcut, inplace=True)


def pooling_branches(channels: int, width: int, norm_layer: NormLayer, activation: str = "relu") -> nn.ModuleList:
    """Return the branches of pyramid pooling: average pooling, then a 1x1 convolution to `width` channels."""
    conv = partial(conv_bn_relu, channels, width, 1, activation=activation, norm_layer=norm_layer)
    return nn.ModuleList(nn.Sequential(AveragePooling(bins), *conv()) for bins in POOL_SCALES)


class AveragePooling(nn.Module):
    """`average_pool` as a module: (N, C, H, W) -> (N, C, bins, bins)."""

    def __init__(self, bins: int):
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        return average_pool(x, self.bins)


def average_pool(x: Tensor, bins: int) -> Tensor:
    """Compute `F.adaptive_avg_pool2d(x, bins)` for (N, C, H, W) as two matrix products.

    Unlike in PyTorch, the backward pass is deterministic on GPUs, and export with dynamic sizes is supported.
    """
    n, c, height, width = x.shape
    symbolic = is_symbolic(height, width)
    matrix = _pooling_matrix if symbolic else _cached_pooling_matrix
    rows, columns = (matrix(side, bins, x.device).to(x.dtype) for side in (height, width))
    if symbolic or x.is_contiguous():
        return rows @ (x @ columns.T)
    x = x.permute(0, 2, 3, 1)  # channels_last: multiply without copying to contiguous memory
    x = (rows @ x.reshape(n, height, width * c)).view(n, bins, width, c)
    return (columns @ x).permute(0, 3, 1, 2)


def _pooling_matrix(side: int, bins: int, device: torch.device) -> Tensor:
    """Return the weight of each input position in each bin, (bins, side) float64."""
    index, position = torch.arange(bins, device=device), torch.arange(side, device=device)
    start, stop = (index * side // bins)[:, None], (((index + 1) * side + bins - 1) // bins)[:, None]
    return ((position >= start) & (position < stop)).double() / (stop - start)


@lru_cache(maxsize=64)  # a few KB each
def _cached_pooling_matrix(side: int, bins: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # inference tensors cannot be used in training
        return to_device(_pooling_matrix(side, bins, torch.device("cpu")), device)


def to_device(matrix: Tensor, device: torch.device) -> Tensor:
    """Move a float64 matrix to a device; as float32 on MPS, which has no float64."""
    return matrix.float().to(device) if device.type == "mps" else matrix.to(device)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert 16-bit logits to float32, for precise resizing, softmax and sums."""
    return x.float() if x.dtype.itemsize < 4 else x


def check_output_stride(output_stride: int, allowed: Sequence[int] = (8, 16, 32)) -> int:
    """Return `output_stride`, or raise a ValueError if it is not allowed."""
    if output_stride not in allowed:
        raise ValueError(f"output stride {output_stride} is not supported by this encoder; choose one of {allowed}")
    return output_stride


def is_symbolic(*sizes: int) -> bool:
    """Return whether a size is symbolic, as in `torch.export` with dynamic shapes."""
    return any(type(size) is not int for size in sizes)


def resize(x: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Resize (N, C, H, W) bilinearly to (N, C, *size); see `F.interpolate` for `align_corners`."""
    if not is_symbolic(*x.shape[-2:], *size) and x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def dilation_of_stage(stride: int, input_stride: int, output_stride: int) -> tuple[int, int, int]:
    """Replace the stride of a stage by dilation once the output stride of the network is reached.

    Returns (stride, dilation of the strided convolution, dilation of the other convolutions). The strided convolution
    of a dilated stage keeps the dilation of the previous stage, as in the published models.
    """
    first = max(1, input_stride // output_stride)
    others = max(1, input_stride * stride // output_stride)
    return stride * first // others, first, others


def init_layer(layer: nn.Module, *, mode: str = "fan_out", norm_bias: float = 0.0) -> None:
    """Initialize a convolution (Kaiming normal, bias 0) or a normalization layer (weight 1, bias `norm_bias`).

    `mode` is 'fan_out' for encoders (He et al., 2015) and 'fan_in' for decoders, because with 'fan_out' the scale of
    the classifier weights would depend on the number of classes.
    """
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
        nn.init.ones_(layer.weight)
        nn.init.constant_(layer.bias, norm_bias)
