"""Synchronized and in-place batch normalization, activation checkpointing, and data parallelism for dicts."""

from .activation_checkpoint import enable_activation_checkpointing
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
from .replicas import ReplicaError, ReplicaGroup
from .scatter import async_copy_to, user_scattered_collate
from .sync_stats import ProcessGroupError

__all__ = [
    "DataParallelWithCallback",
    "DictGatherDataParallel",
    "InPlaceABN",
    "InPlaceABNSync",
    "ProcessGroupError",
    "ReplicaError",
    "ReplicaGroup",
    "SynchronizedBatchNorm1d",
    "SynchronizedBatchNorm2d",
    "SynchronizedBatchNorm3d",
    "UserScatteredDataParallel",
    "async_copy_to",
    "convert_sync_batchnorm",
    "enable_activation_checkpointing",
    "patch_replication_callback",
    "to_batchnorm",
    "user_scattered_collate",
]
