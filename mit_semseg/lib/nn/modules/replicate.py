"""Old name of `mit_semseg.lib.nn`'s replication with callbacks."""

from ..parallel import DataParallelWithCallback, patch_replication_callback

__all__ = ["DataParallelWithCallback", "patch_replication_callback"]
