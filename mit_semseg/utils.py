"""Deprecated import path from version 2."""

# ruff: noqa: F401

from .cli.devices import NotSupportedCliException, parse_devices, process_range
from .cli.logs import setup_logger
from .dataset.layouts import find_recursive
from .evaluation.metrics import AverageMeter, accuracy, intersectionAndUnion, unique
from .predict.visualize import colorEncode
