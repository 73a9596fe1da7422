"""Decoders: list of feature maps -> class scores."""

from .base import Decoder
from .bilinear import C1Bilinear, C5Bilinear, PSPBilinear
from .c1 import C1
from .ppm import PPM
from .upernet import UPerNet

__all__ = ["C1", "PPM", "C1Bilinear", "C5Bilinear", "Decoder", "PSPBilinear", "UPerNet"]
