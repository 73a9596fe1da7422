"""Old names, kept where others import them; each lives elsewhere."""

from .cli.devices import NotSupportedCliException, parse_devices, process_range
from .cli.logs import setup_logger
from .dataset.layouts import find_recursive
from .evaluation.metrics import AverageMeter, accuracy, intersectionAndUnion, unique
from .predict.visualize import colorEncode

__all__ = [
    "AverageMeter",
    "NotSupportedCliException",
    "accuracy",
    "colorEncode",
    "find_recursive",
    "intersectionAndUnion",
    "parse_devices",
    "process_range",
    "setup_logger",
    "unique",
]
