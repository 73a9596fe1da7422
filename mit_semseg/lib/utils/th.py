"""Tensor conversions under their names in version 2."""

from . import as_numpy, mark_volatile

__all__ = ["as_numpy", "mark_volatile"]
