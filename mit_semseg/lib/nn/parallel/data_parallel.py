"""Data parallelism for dicts under its names in version 2."""

from ..scatter import async_copy_to, user_scattered_collate
from . import DictGatherDataParallel, UserScatteredDataParallel

__all__ = ["DictGatherDataParallel", "UserScatteredDataParallel", "async_copy_to", "user_scattered_collate"]
