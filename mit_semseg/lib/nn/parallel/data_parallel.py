"""Data parallelism for dicts under its names in version 2."""

from ..scatter import async_copy_to, user_scattered_collate  # noqa: F401
from . import DictGatherDataParallel, UserScatteredDataParallel  # noqa: F401
