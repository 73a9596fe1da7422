"""Names of version 2: data parallelism over dicts."""

from ..scatter import async_copy_to, user_scattered_collate
from . import DictGatherDataParallel, UserScatteredDataParallel

__all__ = ["DictGatherDataParallel", "UserScatteredDataParallel", "async_copy_to", "user_scattered_collate"]
