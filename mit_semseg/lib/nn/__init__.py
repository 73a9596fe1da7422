"""Synchronized batch normalization and data parallelism over dicts."""

from .batchnorm import (
    BatchNormGroup,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
)
from .parallel import (
    DataParallelWithCallback,
    DictGatherDataParallel,
    UserScatteredDataParallel,
    async_copy_to,
    patch_replication_callback,
    user_scattered_collate,
)

__all__ = [
    "BatchNormGroup",
    "DataParallelWithCallback",
    "DictGatherDataParallel",
    "SynchronizedBatchNorm1d",
    "SynchronizedBatchNorm2d",
    "SynchronizedBatchNorm3d",
    "UserScatteredDataParallel",
    "async_copy_to",
    "patch_replication_callback",
    "user_scattered_collate",
]
