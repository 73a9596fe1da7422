"""Old name of what `mit_semseg.lib.utils` does with tensors."""

from . import as_numpy, mark_volatile

__all__ = ["as_numpy", "mark_volatile"]
