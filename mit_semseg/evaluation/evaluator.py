"""The one loop behind eval.py and the validation during training."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import nn

from ..dataset import ClassTable, ValDataset
from ..dataset.classes import ONE_CLASS_WARNING
from ..dataset.datasets import images_to_device
from ..dataset.image_io import ImageFileError
from ..dataset.loader import items, make_loader, worker_errors
from ..lib.nn import user_scattered_collate
from ..lib.utils import progress_bar
from .inference import DEFAULT_INFERENCE, InferenceOptions, label_map
from .metrics import SegmentationMetric, Summary

DEFAULT_WORKERS = 4  # loader processes; the network is usually the slower part


@dataclass(frozen=True)
class Score:
    """Of one picture: its name, the mean IoU over the classes in its label, and the pixel accuracy; in 0..1. Where no
    pixel is labelled both are 0 and say nothing."""

    name: str
    mean_iou: float
    accuracy: float
    labelled: bool = True


@dataclass(frozen=True)
class Evaluation:
    """Counts of a validation set, or of a share of it.

    Attributes:
        metric: the counts.
        images: how many were scored.
        seconds: how long it took.
        table: class names.
        scores: of every picture that was scored.
        skipped: a sentence for every one that could not be used (DATASET.on_error skip).
    """

    metric: SegmentationMetric
    images: int
    seconds: float
    table: ClassTable
    scores: Sequence[Score] = ()
    skipped: Sequence[str] = ()

    @cached_property
    def summary(self) -> Summary:
        """The scores."""
        return self.metric.summary()

    @classmethod
    def merged(cls, shares: Sequence["Evaluation"]) -> "Evaluation":
        """Several shares together, evaluated side by side; the counts add up.

        Raises:
            ImageFileError: no picture could be used.
        """
        total, images = SegmentationMetric(shares[0].metric.num_class), sum(s.images for s in shares)
        for share in shares:
            total.merge(share.metric)
        skipped = [sentence for s in shares for sentence in s.skipped]
        if skipped and not images:
            raise ImageFileError(f"none of the {len(skipped)} pictures can be used; the first: {skipped[0]}")
        seconds, scores = max(s.seconds for s in shares), [score for s in shares for score in s.scores]
        return cls(total, images, seconds, shares[0].table, scores, skipped)

    @property
    def only_class(self) -> str:
        """Name of the class that all labelled pixels belong to, '' if there are several or none."""
        present = np.flatnonzero(self.summary.present)
        return self.table.names[present[0]] if len(present) == 1 else ""

    @property
    def images_per_second(self) -> float:
        """Speed of the whole loop: reading, network, counting."""
        return self.images / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict:
        """Plain values for a JSON file; scores in 0..1."""
        s = self.summary
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
            "iou_per_class": [
                {"class": name, "iou": float(iou), "present": bool(present)}
                for name, iou, present in zip(self.table.names, s.iou, s.present, strict=True)
            ],
        }

    def report(self) -> str:
        """The scores as text, classes first."""
        s = self.summary
        width = max(len(name) for name in self.table.labels)
        lines = [
            f"  {name:<{width}}  {iou:.4f}" + ("" if present else "  (not in the labels)")
            for name, iou, present in zip(self.table.labels, s.iou, s.present, strict=True)
        ]
        return "\n".join(
            [
                "IoU per class:",
                *lines,
                f"Mean IoU (over all {len(s.iou)} classes): {s.mean_iou:.4f}",
                f"Mean IoU (over the {int(s.present.sum())} present):{s.mean_iou_present:>9.4f}",
                f"Pixel accuracy: {s.pixel_accuracy * 100:.2f} %",
                f"Mean accuracy:  {s.mean_accuracy * 100:.2f} %",
                f"Overall score:  {s.overall * 100:.2f} % (mean of mean IoU and pixel accuracy)",
                f"{self.images} images in {self.seconds:.1f} s: {self.images_per_second:.2f} images/s",
                *([] if s.pixels else ["No pixel is labelled: the figures say nothing."]),
                *([f"Warning: {ONE_CLASS_WARNING.format(self.only_class)}"] if self.only_class else []),
                *([f"{len(self.skipped)} left out, of which the figures say nothing:"] if self.skipped else []),
                *(f"  {sentence}" for sentence in self.skipped),
            ]
        )


def read_items(
    dataset,
    *,
    device: torch.device | str,
    batch_size: int = 1,
    workers: int = DEFAULT_WORKERS,
    timeout: float = 0,
    processes: int = 1,
) -> Iterator[dict]:
    """Items of a data set in order, each with pictures of its own size, read ahead in batches.

    Args:
        dataset: its pictures travel as bytes if it can give them so (`of_bytes`).
        device: where the pictures go, and are normalized.
        workers: loader processes; no more than there are cores for, see `loading.make_loader`.
        timeout: seconds to wait for one, 0 for ever.
        processes: on this machine that read at the same time.

    Raises:
        LoaderError: what loading needs is used up. Around what is done with the items belongs `loading.explained`.
    """
    loader = make_loader(
        dataset.as_uint8() if hasattr(dataset, "as_uint8") else dataset,
        workers=min(workers, len(dataset)),
        timeout=timeout,
        processes=processes,
        batch_size=batch_size,
        collate_fn=user_scattered_collate,
        pin_memory=torch.device(device).type == "cuda",
    )
    for item in chain.from_iterable(items(loader)):
        if "normalization" in item:
            item = {**item, "img_ori": item["img_ori"].numpy(), "img_data": images_to_device(item, device)}
        yield item


def evaluate(
    model: nn.Module,
    dataset: ValDataset,
    *,
    device: torch.device | str = "cpu",
    view: InferenceOptions = DEFAULT_INFERENCE,
    batch_size: int = 1,
    workers: int = DEFAULT_WORKERS,
    timeout: float = 0,
    processes: int = 1,
    progress: bool = True,
    on_result: Callable[[dict, np.ndarray | None], None] | None = None,
) -> Evaluation:
    """Score a model on a validation set.

    Pictures go through the network one by one, whatever the batch size: a batched convolution rounds differently, and
    the figures are not to depend on it.

    Args:
        model: a `SegmentationModule`, of which a copy is made for inference (see `network.prepared`); or what is
            called like one and taken as it is.
        dataset: the pictures and labels.
        device: where the model is.
        view: mirrored, windows, precision.
        batch_size: pictures loaded per step.
        workers, timeout: of `read_items`.
        processes: on this machine that evaluate at the same time and share its cores.
        progress: show a progress bar (on a terminal).
        on_result: called with every item and its (H, W) label map, e.g. to write panels; None for one that cannot be
            used.

    Raises:
        ImageFileError, ListError: a picture or label cannot be used, unless the data set skips those.
    """
    metric, scores = SegmentationMetric(len(dataset.table)), []
    skipped = list(getattr(dataset, "skipped", ()))
    network = view.network(model, device) if isinstance(model, nn.Module) else model
    start = time.perf_counter()
    reading = {"batch_size": batch_size, "workers": workers, "timeout": timeout, "processes": processes}
    bar = progress_bar(total=len(dataset), desc="evaluating", unit="img", shown=progress)
    with worker_errors(), bar:
        for item in read_items(dataset, device=device, **reading):
            prediction = None
            if "error" in item:
                skipped.append(item["error"])
            else:
                prediction = label_map(network, item, device, view)
                scores.append(_scored(item, prediction, metric))
            if on_result:
                on_result(item, prediction)
            bar.update()
    return Evaluation(metric, len(scores), time.perf_counter() - start, dataset.table, scores, skipped)


def _scored(item: dict, prediction: np.ndarray, metric: SegmentationMetric) -> Score:
    """The score of a picture, whose counts are added to those of the set."""
    own = SegmentationMetric(metric.num_class)
    own.add(prediction, item["seg_label"][0].numpy())
    metric.merge(own)
    summary = own.summary()
    return Score(item["info"], summary.mean_iou_present, summary.pixel_accuracy, bool(summary.present.any()))
