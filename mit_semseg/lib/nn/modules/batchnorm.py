"""Deprecated import path from version 2: synchronized batch norms."""

from ..batchnorm import SynchronizedBatchNorm1d, SynchronizedBatchNorm2d, SynchronizedBatchNorm3d  # noqa: F401
