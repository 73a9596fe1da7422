"""Base class of the decoders."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import DEFAULT_NORM, NormLayer, at_least_float32, conv_bn_relu, init_layer, resize

NORM_BIAS = 1e-4  # initial bias of norms in decoders, as for the published models

torch.fx.wrap("at_least_float32")  # FX cannot trace its condition on the dtype


def _save_class_names(decoder: "Decoder", state: dict, prefix: str, metadata: dict) -> None:
    if decoder.class_names:
        metadata["classes"] = list(decoder.class_names)


class Decoder(nn.Module, ABC):
    """Base class of all decoders; a subclass implements `make_layers` and `head`.

    Args:
        in_channels: number of channels of each feature map of the encoder.
        output_stride: stride of the last feature map; `ASPP` selects its dilations by it.
        deepsup: add a deep supervision (auxiliary) head on the second to last feature map, for training only. Decoders
            without support for this head raise a ValueError.
        use_softmax: return probabilities instead of log-probabilities in calls without `segSize`.
        norm_layer: function that returns a normalization layer for a number of channels.
        class_names: names of the classes, which are saved in the metadata of the state dict.
    """

    align_corners = False  # option of bilinear resizing, as in the training of the published weights
    norm_bias = NORM_BIAS

    def __init__(
        self,
        in_channels,
        num_class=150,
        *,
        output_stride=8,
        deepsup=False,
        use_softmax=False,
        norm_layer=DEFAULT_NORM,
        class_names: Sequence[str] = (),
    ):
        super().__init__()
        self.class_names = tuple(class_names)
        self.register_state_dict_post_hook(_save_class_names)
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
        """Create the layers and name the classifier `conv_last`; if `self.deepsup` is True, call `make_deepsup`."""

    @abstractmethod
    def head(self, features: list[Tensor]) -> Tensor:
        """Return logits (N, num_class, h, w), not yet resized to the image."""

    def classifier_layers(self) -> list[str]:
        """Return the names of the convolutions whose output channels are the classes."""
        names = [name for name, layer in self.named_modules() if isinstance(layer, nn.Conv2d)]
        main = [name for name in names if f"{name}.".startswith("conv_last.")][-1]
        return [main, *(name for name in names if name == "conv_last_deepsup")]

    def make_deepsup(self, channels: int, norm_layer: NormLayer, *, dropout: float = 0.0, **options) -> None:
        """Create the layers before the auxiliary classifier; see `layers.conv_bn_relu` for `options`."""
        self.cbr_deepsup = conv_bn_relu(self.in_channels[-2:][0], channels, norm_layer=norm_layer, **options)
        self.dropout_deepsup = nn.Dropout2d(dropout)

    def logits(self, features: list[Tensor]) -> list[Tensor]:
        """Return [main logits], or [main logits, auxiliary logits] with deep supervision; all (N, num_class, h, w)."""
        main = self.head(features)
        if not self.deepsup:
            return [main]
        # HRNetV2 has a single feature map, so the main and the auxiliary head use the same one.
        auxiliary = self.dropout_deepsup(self.cbr_deepsup(features[-2:][0]))
        return [main, self.conv_last_deepsup(auxiliary)]

    def forward(self, features: list[Tensor], segSize: tuple[int, int] | None = None):
        """Return class probabilities (N, num_class, *segSize); `segSize` is (height, width).

        Without `segSize`, return log-probabilities that are not resized, or probabilities with `use_softmax`. With deep
        supervision, log-probabilities are a tuple (main, auxiliary). `features` come from the encoder, largest first.
        """
        if segSize is not None or self.use_softmax:
            logits = at_least_float32(self.head(features))
            return (logits if segSize is None else self.resize(logits, segSize)).softmax(dim=1)
        outputs = tuple(F.log_softmax(logits, dim=1) for logits in self.logits(features))
        return outputs if self.deepsup else outputs[0]

    def resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize (N, C, H, W) bilinearly to (height, width), with the `align_corners` of this decoder."""
        return resize(x, size, align_corners=self.align_corners)
