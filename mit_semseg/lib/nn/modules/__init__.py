"""Synchronized batch norms under their names in version 2."""

from ..batchnorm import SynchronizedBatchNorm1d, SynchronizedBatchNorm2d, SynchronizedBatchNorm3d
from ..parallel import DataParallelWithCallback, patch_replication_callback

__all__ = [
    "DataParallelWithCallback",
    "SynchronizedBatchNorm1d",
    "SynchronizedBatchNorm2d",
    "SynchronizedBatchNorm3d",
    "patch_replication_callback",
]
