"""Deprecated import path from version 2: synchronized batch norms and data parallelism."""

from ..batchnorm import SynchronizedBatchNorm1d, SynchronizedBatchNorm2d, SynchronizedBatchNorm3d  # noqa: F401
from ..parallel import DataParallelWithCallback, patch_replication_callback  # noqa: F401
