"""Deprecated import path from version 2: data parallelism for dicts."""

from ..scatter import async_copy_to, user_scattered_collate  # noqa: F401
from . import DictGatherDataParallel, UserScatteredDataParallel  # noqa: F401
