"""Synchronized and in-place batch norm, activation checkpointing, compilation, and data parallelism for dicts."""

# ruff: noqa: F401

from .activation_checkpoint import enable_activation_checkpointing
from .batchnorm import (
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
    convert_sync_batchnorm,
    to_batchnorm,
)
from .compilation import compile_blocks
from .inplace_abn import InPlaceABN, InPlaceABNSync
from .parallel import (
    DataParallelWithCallback,
    DictGatherDataParallel,
    UserScatteredDataParallel,
    patch_replication_callback,
)
from .replicas import ReplicaError
from .scatter import async_copy_to, user_scattered_collate
from .sync_stats import ProcessGroupError
