"""Evaluate a network on a validation set, in eval.py or during training."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from ..dataset import ClassTable, ValDataset
from ..dataset.classes import ONE_CLASS_WARNING
from ..dataset.image_io import ImageFileError
from ..dataset.loader import iterate, make_loader, worker_errors
from ..dataset.transforms import images_to_device
from ..lib.nn import user_scattered_collate
from ..lib.nn.scatter import HostCopy
from ..lib.utils import progress_bar
from .diagnostics import Diagnostics
from .inference import Prediction, Predictor
from .metrics import SegmentationMetric, Summary, confusion_counts


@dataclass(frozen=True)
class LoadOptions:
    """Options for loading images.

    Attributes:
        batch_size: number of images per DataLoader batch. On a GPU, consecutive images of equal size are processed in
            one batch, except with sliding windows; results can differ from batch size 1 by rounding errors.
        workers: maximum number of worker processes, also limited by the number of cores; 0 loads in this process.
        timeout: seconds to wait for a worker, 0 for no limit.
        local_size: number of ranks or processes that share the cores of this machine.
    """

    batch_size: int = 1
    workers: int = 16
    timeout: float = 0
    local_size: int = 1


@dataclass(frozen=True)
class ImageScore:
    """Metrics of one image.

    Attributes:
        name: path of the image, as in the list.
        mean_iou: mean IoU over the classes in the label, 0..1.
        accuracy: pixel accuracy, 0..1.
        labelled: whether any pixel is labelled; otherwise, the metrics are 0.
        label_quality: see `label_quality.label_quality`; NaN if it was not computed or no pixel is labelled.
    """

    name: str
    mean_iou: float
    accuracy: float
    labelled: bool = True
    label_quality: float = math.nan


@dataclass(frozen=True)
class Evaluation:
    """Result for a validation set, or for one shard of a validation set.

    Attributes:
        metric: confusion matrix of all evaluated images.
        images: number of evaluated images.
        seconds: duration of the evaluation.
        table: class table with the class names.
        scores: metrics of every image.
        skipped: messages about unusable images (DATASET.on_error skip).
        loss_sum, loss_weight: sum of the weighted losses of the images, and sum of their weights; see `evaluate`.
        diagnostics: boundary IoU, calibration and doubtful labels; None if they were not computed.
    """

    metric: SegmentationMetric
    images: int
    seconds: float
    table: ClassTable
    scores: Sequence[ImageScore] = ()
    skipped: Sequence[str] = ()
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    diagnostics: Diagnostics | None = None

    @cached_property
    def summary(self) -> Summary:
        """Metrics over the pixels of all images."""
        return self.metric.summary()

    @classmethod
    def merge(cls, shards: Sequence["Evaluation"]) -> "Evaluation":
        """Merge the results of shards that were evaluated in parallel.

        Raises:
            ImageFileError: every image is unusable.
        """
        total, images = SegmentationMetric(shards[0].metric.num_class), sum(s.images for s in shards)
        diagnostics = Diagnostics(total.num_class) if shards[0].diagnostics else None
        for shard in shards:
            total.merge(shard.metric)
            if diagnostics:
                diagnostics.merge(shard.diagnostics)
        skipped = [message for s in shards for message in s.skipped]
        if skipped and not images:
            raise ImageFileError(f"none of the {len(skipped)} images can be used; the first error is: {skipped[0]}")
        seconds, scores = max(s.seconds for s in shards), [score for s in shards for score in s.scores]
        loss = sum(s.loss_sum for s in shards), sum(s.loss_weight for s in shards)
        return cls(total, images, seconds, shards[0].table, scores, skipped, *loss, diagnostics)

    @property
    def loss(self) -> float:
        """Weighted mean loss of the images; NaN without losses."""
        return self.loss_sum / self.loss_weight if self.loss_weight else math.nan

    @property
    def warning(self) -> str:
        """Reason why the metrics are meaningless, or ''."""
        present = np.flatnonzero(self.summary.present)
        if not len(present):
            return "no pixel is labelled, so the metrics are meaningless; check the label files."
        return ONE_CLASS_WARNING.format(self.table.names[present[0]]) if len(present) == 1 else ""

    @property
    def images_per_second(self) -> float:
        """Number of evaluated images per second; the time includes loading and metrics."""
        return self.images / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict:
        """Return a dict for a JSON file; metrics are in 0..1."""
        s = self.summary
        rows = [
            {"class": name, "iou": float(iou), "present": bool(present)}
            for name, iou, present in zip(self.table.names, s.iou, s.present, strict=True)
        ]
        more = {}
        if self.diagnostics:
            for row, iou in zip(rows, self.diagnostics.boundary_iou.tolist(), strict=True):
                row["boundary_iou"] = None if math.isnan(iou) else iou
            more = {
                "mean_boundary_iou": self.diagnostics.mean_boundary_iou,
                "expected_calibration_error": self.diagnostics.reliability.error,
                "per_image": [
                    {
                        "image": x.name,
                        "label_quality": None if math.isnan(x.label_quality) else x.label_quality,
                        "mean_iou": x.mean_iou,
                        "accuracy": x.accuracy,
                    }
                    for x in sorted(self.scores, key=lambda x: (math.isnan(x.label_quality), x.label_quality, x.name))
                    if x.labelled
                ],
            }
        return {
            "mean_iou": s.mean_iou,
            "mean_iou_present_classes": s.mean_iou_present,
            "pixel_accuracy": s.pixel_accuracy,
            "mean_accuracy": s.mean_accuracy,
            "overall_score": s.overall,
            "images": self.images,
            "skipped": list(self.skipped),
            "labelled_pixels": s.pixels,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images_per_second, 3),
            "iou_per_class": rows,
            **more,
        }

    def report(self) -> str:
        """Return the metrics as text that starts with the IoU of every class."""
        s, names = self.summary, self.table.labels
        width = max(map(len, names))
        lines = [
            f"  {name:<{width}}  {iou:.4f}" + ("" if present else "  (not in the labels)")
            for name, iou, present in zip(names, s.iou, s.present, strict=True)
        ]
        lines = [
            "IoU per class:",
            *lines,
            f"Mean IoU (over all {len(s.iou)} classes): {s.mean_iou:.4f}",
            f"Mean IoU (over the {int(s.present.sum())} present):{s.mean_iou_present:>9.4f}",
            f"Pixel accuracy: {s.pixel_accuracy * 100:.2f} %",
            f"Mean accuracy:  {s.mean_accuracy * 100:.2f} %",
            f"Overall score:  {s.overall * 100:.2f} % (mean of mean IoU and pixel accuracy)",
            *self._diagnostic_lines(),
            f"{self.images} images in {self.seconds:.1f} s: {self.images_per_second:.2f} images/s",
        ]
        if self.warning:
            lines.append(f"Warning: {self.warning}")
        if self.skipped:
            lines += [f"{len(self.skipped)} images skipped, not included in the metrics:"]
            lines += [f"  {message}" for message in self.skipped]
        return "\n".join(lines)

    def _diagnostic_lines(self) -> list[str]:
        if not self.diagnostics:
            return []
        return [
            f"Mean boundary IoU (over the present classes): {self.diagnostics.mean_boundary_iou:.4f}",
            f"Expected calibration error: {self.diagnostics.reliability.error * 100:.2f} %",
        ]


def read_items(dataset, device: torch.device | str, loading: LoadOptions | None = None) -> Iterator[dict]:
    """Yield the items of a dataset in order; workers load the next items in advance.

    Call this function in the context `loader.worker_errors`, which converts errors of workers.

    Args:
        dataset: `ValDataset` or `TestDataset`, whose images are normalized on the device.
        device: device to which images are copied.
        loading: options for loading images.
    """
    loading = loading or LoadOptions()
    loader = make_loader(
        dataset.as_uint8() if hasattr(dataset, "as_uint8") else dataset,
        workers=min(loading.workers, len(dataset)),
        timeout=loading.timeout,
        local_size=loading.local_size,
        batch_size=loading.batch_size,
        collate_fn=user_scattered_collate,
        pin_memory=torch.device(device).type == "cuda",
    )
    for item in chain.from_iterable(iterate(loader)):
        if "img_data" in item:
            item = {**item, "img_ori": np.asarray(item["img_ori"]), "img_data": images_to_device(item, device)}
        yield item


def predict_items(
    predictor: Predictor,
    items: Iterator[dict],
    batch_size: int,
    compute_outputs: Callable[[dict, Prediction], object],
    **attributes: bool,
) -> Iterator[tuple[dict, object]]:
    """Yield pairs (item, outputs). The outputs are on the CPU; they are None if the item has an error.

    The outputs of an item are read after the next item is queued, so that a GPU does not wait for the host.

    Args:
        items: elements of a `ValDataset` or `TestDataset`, see `read_items`.
        batch_size: maximum number of images in a batch, see `LoadOptions`.
        compute_outputs: function of an item and its prediction on the device; returns tensors in nested tuples.
        attributes: optional attributes of the predictions, see `Predictor.predict`.
    """
    previous = None
    while batch := list(islice(items, batch_size)):
        predictions = predictor.predict([item for item in batch if "error" not in item], **attributes)
        for item in batch:
            copy = HostCopy(None if "error" in item else compute_outputs(item, next(predictions)))
            if previous:
                yield previous[0], previous[1].wait()
            previous = item, copy
    if previous:
        yield previous[0], previous[1].wait()


def evaluate(
    predictor: Predictor,
    dataset: ValDataset,
    *,
    loading: LoadOptions | None = None,
    progress: bool = True,
    loss: Callable[[Sequence[Tensor], Tensor], Tensor] | None = None,
    diagnostics: bool = False,
    on_result: Callable[[dict, np.ndarray | None], None] | None = None,
) -> Evaluation:
    """Evaluate a network on a validation set.

    Args:
        predictor: network prepared for inference.
        dataset: validation set with images and labels.
        loading: options for loading images.
        progress: show a progress bar on a terminal.
        loss: function of the images of all scales, (1, 3, h, w) each, and the label (H, W), on the device. It returns a
            tensor with two elements: the loss of the image times its weight, and the weight.
        diagnostics: also compute the boundary IoU, the calibration and the label quality of every image.
        on_result: called with every item and the predicted label map (H, W), which is None for a skipped image.

    Raises:
        ImageFileError, ListError: an image or label is unusable and the dataset does not skip it.
    """
    loading, classes = loading or LoadOptions(), len(dataset.table)
    losses, extra = np.zeros(2), Diagnostics(classes) if diagnostics else None
    metric, scores, skipped = SegmentationMetric(classes), [], list(getattr(dataset, "skipped", ()))
    start = time.perf_counter()

    def outputs(item: dict, prediction: Prediction) -> tuple:
        label = item["seg_label"][0].to(predictor.device, non_blocking=True)
        return (
            confusion_counts(prediction.label_map, label, classes),
            prediction.label_map if on_result or extra else None,
            loss(item["img_data"], label) if loss else None,
            Diagnostics.measure(prediction, label) if extra else None,
        )

    with worker_errors(), progress_bar(total=len(dataset), desc="evaluating", unit="img", shown=progress) as bar:
        items = read_items(dataset, predictor.device, loading)
        for item, result in predict_items(predictor, items, loading.batch_size, outputs, samples=diagnostics):
            if result is None:
                skipped.append(item["error"])
            else:
                counts, label_map, image_loss, measured = result
                image = SegmentationMetric(classes)
                image.add_counts(counts.numpy())
                metric.merge(image)
                s, name = image.summary(), item["info"]
                quality = extra.add(name, label_map.numpy(), measured) if extra else math.nan
                scores.append(ImageScore(name, s.mean_iou_present, s.pixel_accuracy, bool(s.present.any()), quality))
                if loss:
                    losses += image_loss.numpy()
            if on_result:
                on_result(item, None if result is None else label_map.numpy())
            bar.update()
    seconds = time.perf_counter() - start
    return Evaluation(metric, len(scores), seconds, dataset.table, scores, skipped, *losses.tolist(), extra)
