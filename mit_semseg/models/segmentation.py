"""The whole network: encoder, decoder and loss."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import at_least_float32


class SegmentationModuleBase(nn.Module):
    """What modules of encoder and decoder share."""

    def pixel_acc(self, pred: Tensor, label: Tensor) -> Tensor:
        """See `pixel_accuracy`."""
        return pixel_accuracy(pred, label)


class SegmentationModule(SegmentationModuleBase):
    """Encoder and decoder, called with a batch dict.

    Args:
        enc: encoder, see `mit_semseg.models.encoders`.
        dec: decoder, see `mit_semseg.models.decoders`.
        crit: loss over (log-probabilities (N, C, H, W), labels (N, H, W)), e.g. `nn.NLLLoss(ignore_index=-1)`; or with
            a method `of_logits` over (logits, labels), which is then called instead.
        deep_sup_scale: weight of the deep supervision branch; None leaves the branch out.
    """

    def __init__(self, enc: nn.Module, dec: nn.Module, crit: nn.Module | None, deep_sup_scale: float | None = None):
        super().__init__()
        self.encoder = enc
        self.decoder = dec
        self.crit = crit
        self.deep_sup_scale = deep_sup_scale

    def forward(self, feed_dict: dict, *, segSize: tuple[int, int] | None = None):
        """Loss and accuracy of a labelled batch, or class probabilities.

        Args:
            feed_dict: `img_data` (N, 3, H, W) normalized pictures and, for training, `seg_label` (N, h, w) int64 with
                negative values ignored; h and w may be any size (usually H and W over the label's downsampling rate).
            segSize: (height, width) of the probabilities; given, no label is needed.

        Returns:
            With `segSize` probabilities (N, C, *segSize), else (loss, pixel accuracy), both scalars.
        """
        features = self._features(feed_dict)
        if segSize is not None:
            return self.decoder(features, segSize=segSize)
        label = feed_dict["seg_label"]
        # Where the decoder's resolution is not the label's, the scores are brought to the label: a label cannot be
        # interpolated. The published recipes choose the label's rate so that nothing is resized here.
        logits = [self.decoder.resize(scores, label.shape[-2:]) for scores in self.decoder.logits(features)]
        loss = self._loss(logits[0], label)
        if self.deep_sup_scale is not None and len(logits) > 1:
            loss = loss + self.deep_sup_scale * self._loss(logits[1], label)
        return loss, pixel_accuracy(logits[0], label)

    def _loss(self, logits: Tensor, label: Tensor) -> Tensor:
        of_logits = getattr(self.crit, "of_logits", None)
        if of_logits:
            return of_logits(logits, label)
        return self.crit(F.log_softmax(at_least_float32(logits), dim=1), label)  # a CPU's autocast leaves 16 bits

    def logits(self, feed_dict: dict) -> Tensor:
        """Raw class scores (N, C, h, w) of `img_data`, at the decoder's own resolution."""
        return self.decoder.head(self._features(feed_dict))

    def _features(self, feed_dict: dict) -> Sequence[Tensor]:
        x, options = feed_dict["img_data"], {"return_feature_maps": True}
        if getattr(self.encoder, "can_be_lazy", False):
            options["lazily"] = True
        return self.encoder(x, **options)

    @property
    def align_corners(self) -> bool:
        """How the decoder resizes, see `Decoder`."""
        return self.decoder.align_corners


def pixel_accuracy(scores: Tensor, label: Tensor) -> Tensor:
    """Share of labelled pixels (label >= 0) whose highest score is the label's; 0 if no pixel is labelled.

    Args:
        scores: (N, C, H, W).
        label: (N, H, W) integers.

    Returns:
        A float32 scalar in 0..1, on the scores' device.
    """
    valid = label >= 0
    correct = ((scores.argmax(dim=1) == label) & valid).sum()
    return correct.float() / valid.sum().clamp(min=1)
