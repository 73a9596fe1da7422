"""Names of version 2: replication with callbacks."""

from ..parallel import DataParallelWithCallback, patch_replication_callback

__all__ = ["DataParallelWithCallback", "patch_replication_callback"]
