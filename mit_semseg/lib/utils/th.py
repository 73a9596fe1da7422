"""Tensor conversions under their names in version 2."""

from . import as_numpy, mark_volatile  # noqa: F401
