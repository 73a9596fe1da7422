"""Decoders: list of feature maps -> class scores."""

from .base import Decoder
from .bilinear import C1Bilinear, C5Bilinear, PSPBilinear
from .c1 import C1
from .deeplab import ASPP
from .ppm import PPM
from .psp import PSP
from .upernet import UPerNet

__all__ = ["ASPP", "C1", "PPM", "PSP", "C1Bilinear", "C5Bilinear", "Decoder", "PSPBilinear", "UPerNet"]
