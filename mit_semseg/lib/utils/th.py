"""Deprecated import path from version 2: tensor conversions."""

from . import as_numpy, mark_volatile  # noqa: F401
