"""The segmentation network: encoder, decoder and loss."""

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import at_least_float32


def pixel_accuracy(scores: Tensor, label: Tensor) -> Tensor:
    """Return the fraction of correct pixels, without negative labels, as a scalar tensor; 0 if no pixel is labelled.

    `scores` are (N, C, H, W) and `label` (N, H, W) integers.
    """
    valid = label >= 0
    correct = ((scores.argmax(dim=1) == label) & valid).sum()
    return correct.float() / valid.sum().clamp(min=1)


class SegmentationModuleBase(nn.Module):
    """Base class of version 2."""

    pixel_acc = staticmethod(pixel_accuracy)


class SegmentationModule(SegmentationModuleBase):
    """Encoder, decoder and loss, called with a batch dict.

    Args:
        enc: encoder, see `mit_semseg.models.encoders`.
        dec: decoder, see `mit_semseg.models.decoders`.
        crit: loss on (log-probabilities (N, C, H, W), labels (N, H, W)), e.g. `nn.NLLLoss(ignore_index=-1)`. If it has
            a method `of_logits(logits, labels)`, this is called instead.
        deep_sup_scale: weight of the deep supervision (auxiliary) loss; None disables it.
    """

    def __init__(self, enc: nn.Module, dec: nn.Module, crit: nn.Module | None, deep_sup_scale: float | None = None):
        super().__init__()
        self.encoder = enc
        self.decoder = dec
        self.crit = crit
        self.deep_sup_scale = deep_sup_scale

    def forward(self, feed_dict: dict, *, segSize: tuple[int, int] | None = None):
        """Return probabilities (N, C, *segSize) if `segSize` (height, width) is set, else the scalars (loss, accuracy).

        `feed_dict` has `img_data` (N, 3, H, W), normalized images, and for the loss `seg_label` (N, h, w) int64 of any
        size, usually (H, W) divided by the label downsampling rate; negative labels are ignored.
        """
        features = self.encoder(feed_dict["img_data"], return_feature_maps=True)
        if segSize is not None:
            return self.decoder(features, segSize=segSize)
        label = feed_dict["seg_label"]
        # With the published options the label already has the decoder's resolution, and nothing is resized.
        size = label.shape[-2:]
        logits = [x if x.shape[-2:] == size else self.decoder.resize(x, size) for x in self.decoder.logits(features)]
        loss = self._loss(logits[0], label)
        if self.deep_sup_scale is not None and len(logits) > 1:
            loss = loss + self.deep_sup_scale * self._loss(logits[1], label)
        return loss, pixel_accuracy(logits[0], label)

    def _loss(self, logits: Tensor, label: Tensor) -> Tensor:
        if hasattr(self.crit, "of_logits"):
            return self.crit.of_logits(logits, label)
        return self.crit(F.log_softmax(at_least_float32(logits), dim=1), label)  # autocast on CPU keeps 16 bits

    def logits(self, feed_dict: dict) -> Tensor:
        """Return the logits (N, C, h, w) of `img_data` at the resolution of the decoder."""
        return self.decoder.head(self.encoder(feed_dict["img_data"], return_feature_maps=True))

    @property
    def align_corners(self) -> bool:
        """The `align_corners` of the decoder."""
        return self.decoder.align_corners
