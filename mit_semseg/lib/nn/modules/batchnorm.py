"""Synchronized batch norms under their names in version 2."""

from ..batchnorm import SynchronizedBatchNorm1d, SynchronizedBatchNorm2d, SynchronizedBatchNorm3d  # noqa: F401
