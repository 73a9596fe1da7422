"""Replication with callbacks under its names in version 2."""

from ..parallel import DataParallelWithCallback, patch_replication_callback  # noqa: F401
