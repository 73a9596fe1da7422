"""Names of version 2: conversions of tensors."""

from . import as_numpy, mark_volatile

__all__ = ["as_numpy", "mark_volatile"]
