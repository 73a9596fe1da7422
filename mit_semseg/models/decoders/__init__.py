"""Decoders: list of feature maps -> class scores."""

from .base import Decoder
from .c1 import C1
from .ppm import PPM
from .upernet import UPerNet

__all__ = ["C1", "PPM", "Decoder", "UPerNet"]
