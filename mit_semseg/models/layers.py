"""Building blocks shared by encoders and decoders."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lib.nn import InPlaceABN, InPlaceABNSync, SynchronizedBatchNorm2d
from ..lib.utils import IMAGENET_MEAN, IMAGENET_STD, UserError, cache_tensors

torch.fx.wrap("dilated_depthwise")  # FX cannot trace its conditions on shapes

NormLayer = Callable[[int], nn.Module]  # function from number of channels to normalization layer
# With clamp_variance=False, norms always divide by sqrt(var + eps), also in synchronized training.
DEFAULT_NORM: NormLayer = partial(SynchronizedBatchNorm2d, clamp_variance=False)
LEAKY_SLOPE = 0.01  # slope of leaky ReLU for negative inputs
NORMS: dict[str, NormLayer] = {
    "batch": partial(SynchronizedBatchNorm2d, clamp_variance=False, synchronized=False),
    "sync": DEFAULT_NORM,
    "inplace": partial(InPlaceABNSync, slope=LEAKY_SLOPE),
}
ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": partial(nn.LeakyReLU, LEAKY_SLOPE)}
POOL_SCALES = (1, 2, 3, 6)  # bins per side in pyramid pooling (Zhao et al., "Pyramid Scene Parsing Network", 2017)


class SameConv2d(nn.Conv2d):
    """Convolution with stride 2 and TensorFlow's "SAME" padding.

    For an even height (width), one row (column) less is padded at the top (left).
    """

    def forward(self, x: Tensor) -> Tensor:
        (height, width), side = x.shape[-2:], self.kernel_size[0] // 2
        return super().forward(F.pad(x, (side - 1 + width % 2, side, side - 1 + height % 2, side)))


class DilatedDepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution with stride 1, see `dilated_depthwise`."""

    def forward(self, x: Tensor) -> Tensor:
        return dilated_depthwise(x, self.weight, self.bias, self.dilation[0])


def dilated_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Convolve each channel of (N, C, H, W) with its own kernel; the size does not change.

    On CPUs without AVX-512, PyTorch's gradients of this operation are slow. In training with channels last input on a
    CPU, each feature map is split into dilation² maps that contain every dilation-th row and column, and that are
    convolved without dilation.
    """
    n, channels, height, width = x.shape
    padding = dilation * (weight.size(2) // 2)
    training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    split = training and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
    if not split or torch.compiler.is_compiling():
        return F.conv2d(x, weight, bias, 1, padding, dilation, channels)
    rows, columns = -(-height // dilation), -(-width // dilation)
    x = F.pad(x, (0, columns * dilation - width, 0, rows * dilation - height)).permute(0, 2, 3, 1)
    x = x.reshape(n, rows, dilation, columns, dilation, channels).permute(0, 2, 4, 1, 3, 5)
    x = x.reshape(-1, rows, columns, channels).permute(0, 3, 1, 2)
    x = F.conv2d(x, weight, bias, 1, padding // dilation, 1, channels).permute(0, 2, 3, 1)
    x = x.reshape(n, dilation, dilation, rows, columns, channels).permute(0, 3, 1, 4, 2, 5)
    x = x.reshape(n, rows * dilation, columns * dilation, channels).permute(0, 3, 1, 2)
    return x[:, :, :height, :width].contiguous(memory_format=torch.channels_last)


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride=1,
    dilation=1,
    groups=1,
    bias=False,
    same_padding=False,
) -> nn.Conv2d:
    """Return a convolution, by default without bias; with stride 1 and odd `kernel_size`, it keeps height and width.

    With `same_padding`, convolutions with stride 2 are `SameConv2d`.
    """
    if same_padding and stride == 2:
        return SameConv2d(in_channels, out_channels, kernel_size, stride, 0, dilation, groups, bias)
    padding = dilation * (kernel_size // 2)
    kind = DilatedDepthwiseConv2d if dilation > 1 and stride == 1 and 1 < groups == in_channels else nn.Conv2d
    return kind(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)


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

    If the norm is in-place and has its own activation, ReLU and leaky ReLU are replaced by `nn.Identity`.
    """
    norm = norm_layer(channels)
    if is_activated(norm) and activation == "relu6":
        norm = norm.without_activation()
    if is_activated(norm):
        return norm, nn.Identity()
    inplace = not isinstance(norm, InPlaceABN)  # InPlaceABN needs its unmodified output in the backward pass
    return norm, ACTIVATIONS[activation](inplace=inplace)


def is_activated(norm: nn.Module) -> bool:
    """Return whether a normalization layer also applies an activation."""
    return isinstance(norm, InPlaceABN) and norm.activation != "none"


def norm_add_relu(norm: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
    """Return relu(norm(x) + shortcut); if `norm` has its own activation, use that instead of ReLU."""
    return norm(x, shortcut) if is_activated(norm) else F.relu(norm(x) + shortcut, inplace=True)


def pooling_branches(channels: int, width: int, norm_layer: NormLayer, activation: str = "relu") -> nn.ModuleList:
    """Return the branches of pyramid pooling; each averages over bins, then applies a 1x1 convolution block."""
    return nn.ModuleList(pooling_branch(bins, channels, width, norm_layer, activation) for bins in POOL_SCALES)


def pooling_branch(
    bins: int, channels: int, width: int, norm_layer: NormLayer, activation: str = "relu"
) -> nn.Sequential:
    """Return a branch that averages over bins and applies a 1x1 convolution block: (N, C, H, W) to (N, width, b, b)."""
    block = conv_bn_relu(channels, width, 1, activation=activation, norm_layer=norm_layer)
    for layer in block:
        if isinstance(layer, SynchronizedBatchNorm2d):
            layer.after_global_pooling = bins == 1
    return nn.Sequential(AveragePooling(bins), *block)


class AveragePooling(nn.Module):
    """`average_pool` as a module: (N, C, H, W) -> (N, C, bins, bins)."""

    def __init__(self, bins: int):
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        return average_pool(x, self.bins)


def average_pool(x: Tensor, bins: int) -> Tensor:
    """Compute `F.adaptive_avg_pool2d(x, bins)` for (N, C, H, W) as two matrix products.

    Unlike PyTorch's function, it has a deterministic backward pass on GPUs and supports export with dynamic sizes.
    """
    if isinstance(x, torch.fx.Proxy):
        return F.adaptive_avg_pool2d(x, bins)
    n, c, height, width = x.shape
    symbolic = is_symbolic(height, width)
    matrix = _pooling_matrix if symbolic else _cached_pooling_matrix
    rows, columns = (matrix(side, bins, x.dtype, x.device) for side in (height, width))
    if symbolic or x.is_contiguous():
        return rows @ (x @ columns.T)
    x = x.permute(0, 2, 3, 1)  # channels_last memory is multiplied without a copy to contiguous memory
    x = (rows @ x.reshape(n, height, width * c)).view(n, bins, width, c)
    return (columns @ x).permute(0, 3, 1, 2)


def _pooling_matrix(side: int, bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a matrix (bins, side) with the weight of each input position in each bin."""
    index, position = torch.arange(bins, device=device), torch.arange(side, device=device)
    start, stop = (index * side // bins)[:, None], (((index + 1) * side + bins - 1) // bins)[:, None]
    return (((position >= start) & (position < stop)).double() / (stop - start)).to(dtype)


_cached_pooling_matrix = cache_tensors(_pooling_matrix)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert float16 or bfloat16 logits to float32, so that resizing, softmax and sums are accurate."""
    return x.float() if x.dtype.itemsize < 4 else x


def renormalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Convert images (N, 3, H, W) with ImageNet normalization to (value - mean) / std, for values in 0..1."""
    if (tuple(mean), tuple(std)) == (IMAGENET_MEAN, IMAGENET_STD):
        return x
    scale, offset = _renormalization(tuple(mean), tuple(std), x.dtype, x.device)
    return torch.addcmul(offset, x, scale)


@cache_tensors
def _renormalization(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the factors and the terms (3, 1, 1) of `renormalize`."""
    channels = list(zip(IMAGENET_MEAN, IMAGENET_STD, mean, std, strict=True))
    scale = [torch.full((1, 1), std / new_std, dtype=dtype, device=device) for _, std, _, new_std in channels]
    terms = [
        torch.full((1, 1), (mean - new_mean) / new_std, dtype=dtype, device=device)
        for mean, _, new_mean, new_std in channels
    ]
    return torch.stack(scale), torch.stack(terms)


def set_input_channels(encoder: nn.Module, channels: int) -> nn.Module:
    """Change the convolutions of RGB images in an encoder in place to `channels` input channels; return the encoder.

    As in timm, the RGB weights are repeated and multiplied by 3 / `channels`; for one channel, they are summed. Images
    are then not converted from ImageNet normalization to that of the weights.

    Raises:
        UserError: the encoder has no convolution with three input channels.
    """
    names = image_convolutions(encoder)
    if encoder.get_submodule(names[0]).in_channels != 3:
        name = type(encoder).__name__
        raise UserError(f"{name} has no convolution of RGB images, so DATASET.channels is not supported")
    for conv in map(encoder.get_submodule, names if channels != 3 else ()):
        weight = conv.weight.detach()
        if channels == 1:
            weight = weight.sum(1, keepdim=True)
        else:
            weight = weight[:, [i % 3 for i in range(channels)]] * (3 / channels)
        conv.in_channels, conv.weight = channels, nn.Parameter(weight)
    if hasattr(encoder, "mean"):
        encoder.mean, encoder.std = IMAGENET_MEAN, IMAGENET_STD
    return encoder


def image_convolutions(encoder: nn.Module) -> list[str]:
    """Return the names of the convolutions of the image: those with as many input channels as the first one."""
    convolutions = {name: layer for name, layer in encoder.named_modules() if isinstance(layer, nn.Conv2d)}
    channels = next(iter(convolutions.values())).in_channels
    return [name for name, layer in convolutions.items() if layer.in_channels == channels]


def check_output_stride(output_stride: int, allowed: Sequence[int] = (8, 16, 32)) -> int:
    """Return `output_stride`, or raise a ValueError if it is not allowed."""
    if output_stride not in allowed:
        raise ValueError(f"output stride {output_stride} is not supported by this encoder; choose one of {allowed}")
    return output_stride


def is_symbolic(*sizes: int) -> bool:
    """Return whether any of the sizes is symbolic, as in `torch.export` with dynamic shapes."""
    return any(type(size) is not int for size in sizes)


def resize(x: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Resize (N, C, H, W) bilinearly to (N, C, *size); see `F.interpolate` for `align_corners`."""
    if isinstance(x, torch.fx.Proxy):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)
    if not is_symbolic(*x.shape[-2:], *size) and x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def dilation_of_stage(stride: int, input_stride: int, output_stride: int) -> tuple[int, int, int]:
    """Return (stride, dilation of the strided convolution, dilation of the other convolutions) of a stage.

    If `input_stride * stride` exceeds `output_stride`, dilation replaces the stride. The convolution that loses its
    stride then has the dilation of the previous stage, as in the published models.
    """
    first = max(1, input_stride // output_stride)
    others = max(1, input_stride * stride // output_stride)
    return stride * first // others, first, others


def init_layer(layer: nn.Module, *, mode: str = "fan_out", norm_bias: float = 0.0) -> None:
    """Initialize a convolution (Kaiming normal, bias 0) or a normalization layer (weight 1, bias `norm_bias`).

    `mode` is 'fan_out' for encoders (He et al., 2015) and 'fan_in' for decoders. With 'fan_out', the scale of the
    classifier weights would depend on the number of classes.
    """
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
        nn.init.ones_(layer.weight)
        nn.init.constant_(layer.bias, norm_bias)
