"""Encoders, decoders and the whole network."""

from .builder import DECODERS, ENCODERS, ModelBuilder
from .segmentation import SegmentationModule

__all__ = ["DECODERS", "ENCODERS", "ModelBuilder", "SegmentationModule"]
