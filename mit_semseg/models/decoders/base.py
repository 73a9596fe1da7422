"""What every decoder shares: the public call, and the deep supervision branch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import NormLayer, at_least_float32, conv_bn_relu, resize
from ..pyramid import through_map

NORM_BIAS = 1e-4  # initial bias of a decoder's norms; the published models were trained from it


class Decoder(nn.Module, ABC):
    """Base of all decoders. A subclass implements `head(features)`, and calls `make_deepsup` if it was asked to.

    Args:
        in_channels: channels of every feature map the encoder returns.
        num_class: number of classes.
        use_softmax: a call without `segSize` returns probabilities instead of log-probabilities (kept for old callers).

    Attributes:
        align_corners: how the decoder resizes, see `layers.resize`; its weights were trained with it.
    """

    align_corners = False

    def __init__(self, in_channels: Sequence[int], num_class: int, use_softmax: bool = False):
        super().__init__()
        self.in_channels = tuple(in_channels)
        self.num_class = num_class
        self.use_softmax = use_softmax

    @abstractmethod
    def head(self, features: list[Tensor]) -> Tensor:
        """Logits (N, num_class, h, w) at the decoder's own resolution."""

    def logits(self, features: list[Tensor]) -> list[Tensor]:
        """Raw class scores, each (N, num_class, h, w): the main ones, then the deep supervision branch's, if any."""
        main = self.head(features)
        if not hasattr(self, "cbr_deepsup"):
            return [main]
        branch = self.dropout_deepsup(through_map(self.cbr_deepsup, features, _last_but_one(len(features))))
        return [main, self.conv_last_deepsup(branch)]

    def forward(self, features: list[Tensor], segSize: tuple[int, int] | None = None):
        """Probabilities for inference, or log-probabilities for training.

        Args:
            features: the encoder's feature maps, highest resolution first.
            segSize: (height, width) to upsample the logits to (bilinear).

        Returns:
            With `segSize` or `use_softmax`: probabilities (N, num_class, *segSize). Else log-probabilities at the
            decoder's own resolution; with deep supervision a pair (main, branch).
        """
        if segSize is not None or self.use_softmax:
            scores = at_least_float32(self.head(features))
            return (scores if segSize is None else self.resize(scores, segSize)).softmax(dim=1)
        outputs = tuple(F.log_softmax(logits, dim=1) for logits in self.logits(features))
        return outputs if len(outputs) > 1 else outputs[0]

    def resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Bilinear resize to (height, width), the way this decoder does it."""
        return resize(x, size, align_corners=self.align_corners)

    def make_deepsup(self, channels: int, norm_layer: NormLayer, *, dropout: float = 0.0, **layer) -> None:
        """Add the first layer of the deep supervision branch on the last but one feature map.

        Args:
            layer: options of `layers.conv_bn_relu`.
        """
        self.cbr_deepsup = conv_bn_relu(
            self.in_channels[_last_but_one(len(self.in_channels))], channels, norm_layer=norm_layer, **layer
        )
        self.dropout_deepsup = nn.Dropout2d(dropout)


def _last_but_one(maps: int) -> int:
    # An encoder with a single map (HRNetV2) supervises that one twice.
    return -2 if maps > 1 else -1
