"""Encoders, decoders and the segmentation network."""

from .builder import DECODERS, ENCODERS, ModelBuilder
from .segmentation import SegmentationModule

__all__ = ["DECODERS", "ENCODERS", "ModelBuilder", "SegmentationModule"]
