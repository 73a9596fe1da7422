"""Base class of the decoders: constructor, call and deep supervision."""

from abc import ABC, abstractmethod
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import DEFAULT_NORM, NormLayer, at_least_float32, conv_bn_relu, init_layer, resize

NORM_BIAS = 1e-4  # initial bias of the norms in the decoders of the published models


class Decoder(nn.Module, ABC):
    """Base of all decoders; a subclass implements `make_layers` and `head`.

    Args:
        in_channels: channels of every feature map of the encoder.
        output_stride: stride of the last feature map, on which the dilation in ASPP depends.
        deepsup: add a deep supervision (auxiliary) head on the second to last feature map, used in training only.
            Raises a ValueError if unsupported.
        use_softmax: return probabilities instead of log-probabilities if `segSize` is not given.
        norm_layer: function from a number of channels to a normalization layer.
    """

    align_corners = False  # option for bilinear resizing with which the published weights were trained
    norm_bias = NORM_BIAS

    def __init__(
        self, in_channels, num_class=150, *, output_stride=8, deepsup=False, use_softmax=False, norm_layer=DEFAULT_NORM
    ):
        super().__init__()
        self.in_channels, self.output_stride = tuple(in_channels), output_stride
        self.num_class, self.use_softmax, self.deepsup = num_class, use_softmax, deepsup
        self.make_layers(norm_layer)
        if deepsup:
            if not hasattr(self, "cbr_deepsup"):
                raise ValueError(f"{type(self).__name__} does not support deep supervision; set deepsup=False")
            self.conv_last_deepsup = nn.Conv2d(self.cbr_deepsup[0].out_channels, num_class, 1)
        self.apply(partial(init_layer, mode="fan_in", norm_bias=self.norm_bias))

    @abstractmethod
    def make_layers(self, norm_layer: NormLayer) -> None:
        """Create the layers, the last one as `conv_last`; call `make_deepsup` if `self.deepsup`."""

    @abstractmethod
    def head(self, features: list[Tensor]) -> Tensor:
        """Return logits (N, num_class, h, w) at the resolution of the decoder."""

    def make_deepsup(self, channels: int, norm_layer: NormLayer, *, dropout: float = 0.0, **options) -> None:
        """Create the first layer of the deep supervision head; see `layers.conv_bn_relu` for `options`."""
        self.cbr_deepsup = conv_bn_relu(self.in_channels[-2:][0], channels, norm_layer=norm_layer, **options)
        self.dropout_deepsup = nn.Dropout2d(dropout)

    def logits(self, features: list[Tensor]) -> list[Tensor]:
        """Return the main logits and, with deep supervision, the auxiliary logits: list of (N, num_class, h, w)."""
        main = self.head(features)
        if not self.deepsup:
            return [main]
        # HRNetV2 has a single feature map, which both heads use.
        auxiliary = self.dropout_deepsup(self.cbr_deepsup(features[-2:][0]))
        return [main, self.conv_last_deepsup(auxiliary)]

    def forward(self, features: list[Tensor], segSize: tuple[int, int] | None = None):
        """Return class probabilities if `segSize` or `use_softmax` is set, resized to `segSize` (height, width).

        Otherwise return log-probabilities at the resolution of the decoder; with deep supervision a tuple (main,
        auxiliary). `features` are the feature maps of the encoder, highest resolution first.
        """
        if segSize is not None or self.use_softmax:
            logits = at_least_float32(self.head(features))
            return (logits if segSize is None else self.resize(logits, segSize)).softmax(dim=1)
        outputs = tuple(F.log_softmax(logits, dim=1) for logits in self.logits(features))
        return outputs if self.deepsup else outputs[0]

    def resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize (N, C, H, W) bilinearly to (height, width), with the `align_corners` of this decoder."""
        return resize(x, size, align_corners=self.align_corners)
