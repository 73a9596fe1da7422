"""Inference, metrics, and evaluation on a validation set."""

from .evaluator import evaluate
from .inference import InferenceOptions, Predictor
from .metrics import AverageMeter, SegmentationMetric, accuracy, intersectionAndUnion

__all__ = [
    "AverageMeter",
    "InferenceOptions",
    "Predictor",
    "SegmentationMetric",
    "accuracy",
    "evaluate",
    "intersectionAndUnion",
]
