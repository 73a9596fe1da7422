"""Inference, metrics, and the one loop that evaluates."""

from .evaluator import evaluate
from .inference import InferenceOptions, label_map, multi_scale_scores
from .metrics import AverageMeter, SegmentationMetric, accuracy, intersectionAndUnion

__all__ = [
    "AverageMeter",
    "InferenceOptions",
    "SegmentationMetric",
    "accuracy",
    "evaluate",
    "intersectionAndUnion",
    "label_map",
    "multi_scale_scores",
]
