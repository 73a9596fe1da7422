"""Synchronized batch normalization, also in place with its activation, and data parallelism over dicts."""

from .batchnorm import (
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
    convert_sync_batchnorm,
    to_batchnorm,
)
from .inplace_abn import InPlaceABN, InPlaceABNSync
from .parallel import (
    DataParallelWithCallback,
    DictGatherDataParallel,
    UserScatteredDataParallel,
    patch_replication_callback,
)
from .recompute import Blocks, recompute
from .scatter import async_copy_to, user_scattered_collate
from .sync import ProcessStopped, ReplicaGroup, ReplicaStopped

__all__ = [
    "Blocks",
    "DataParallelWithCallback",
    "DictGatherDataParallel",
    "InPlaceABN",
    "InPlaceABNSync",
    "ProcessStopped",
    "ReplicaGroup",
    "ReplicaStopped",
    "SynchronizedBatchNorm1d",
    "SynchronizedBatchNorm2d",
    "SynchronizedBatchNorm3d",
    "UserScatteredDataParallel",
    "async_copy_to",
    "convert_sync_batchnorm",
    "patch_replication_callback",
    "recompute",
    "to_batchnorm",
    "user_scattered_collate",
]
