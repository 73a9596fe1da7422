"""Old names, kept where others import them; each lives elsewhere."""

from .apps.devices import NotSupportedCliException, parse_devices, process_range
from .apps.logs import setup_logger
from .apps.visualize import colorEncode
from .dataset.layouts import find_recursive
from .evaluation.metrics import AverageMeter, accuracy, intersectionAndUnion, unique

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
