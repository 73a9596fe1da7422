"""The segmentation network: encoder, decoder and loss."""

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import at_least_float32


def pixel_accuracy(logits: Tensor, label: Tensor) -> Tensor:
    """Return the fraction of correctly classified pixels as a scalar tensor; pixels with negative labels are ignored.

    `logits`: (N, C, H, W); `label`: (N, H, W) integers. The result is 0 if all labels are negative.
    """
    valid = label >= 0
    correct = ((logits.argmax(dim=1) == label) & valid).sum()
    return correct.float() / valid.sum().clamp(min=1)


class SegmentationModuleBase(nn.Module):
    """Deprecated base class from version 2."""

    pixel_acc = staticmethod(pixel_accuracy)


class SegmentationModule(SegmentationModuleBase):
    """Encoder, decoder and loss in one module, which is called with a batch (a dict).

    Args:
        enc, dec: encoder and decoder, see `ModelBuilder`.
        crit: loss function of log-probabilities (N, C, H, W) and labels (N, H, W), e.g. `nn.NLLLoss(ignore_index=-1)`.
            If it has a method `of_logits(logits, labels)`, this method is called instead.
        deep_sup_scale: weight of the deep supervision (auxiliary) loss; None disables this loss.

    Attributes:
        temperature: inference divides the logits by this number before softmax, see `evaluation.calibration`.
    """

    temperature = 1.0

    def __init__(self, enc: nn.Module, dec: nn.Module, crit: nn.Module | None, deep_sup_scale: float | None = None):
        super().__init__()
        self.encoder, self.decoder, self.crit = enc, dec, crit
        self.deep_sup_scale = deep_sup_scale

    def forward(self, feed_dict: dict, *, segSize: tuple[int, int] | None = None):
        """Return class probabilities (N, C, *segSize), or without `segSize` scalar tensors (loss, pixel accuracy).

        `segSize` is (height, width). `feed_dict["img_data"]` holds normalized images (N, 3, H, W). The loss also needs
        int64 labels (N, h, w) in `feed_dict["seg_label"]`. Their size is arbitrary; the logits are resized to it.
        """
        features = self.encoder(feed_dict["img_data"], return_feature_maps=True)
        if segSize is not None:
            return self.decoder(features, segSize=segSize)
        label = feed_dict["seg_label"]
        # With the options of the published models, labels and logits have the same size, and nothing is resized.
        size = label.shape[-2:]
        logits = [x if x.shape[-2:] == size else self.decoder.resize(x, size) for x in self.decoder.logits(features)]
        loss = self._loss(logits[0], label)
        if self.deep_sup_scale is not None and len(logits) > 1:
            loss = loss + self.deep_sup_scale * self._loss(logits[1], label)
        return loss, pixel_accuracy(logits[0], label)

    def _loss(self, logits: Tensor, label: Tensor) -> Tensor:
        if hasattr(self.crit, "of_logits"):
            return self.crit.of_logits(logits, label)
        return self.crit(F.log_softmax(at_least_float32(logits), dim=1), label)  # CPU autocast does not convert logits

    def logits(self, feed_dict: dict) -> Tensor:
        """Return the logits (N, C, h, w) of `img_data`, not yet resized to the image."""
        return self.decoder.head(self.encoder(feed_dict["img_data"], return_feature_maps=True))

    @property
    def align_corners(self) -> bool:
        """Whether the decoder resizes with `align_corners=True`."""
        return self.decoder.align_corners
