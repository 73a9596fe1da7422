"""Deprecated import path from version 2: data parallelism."""

from ..parallel import DataParallelWithCallback, patch_replication_callback  # noqa: F401
