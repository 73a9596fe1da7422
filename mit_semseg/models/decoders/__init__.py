"""Decoders: list of feature maps -> class scores."""

from .base import Decoder
from .bilinear import C1Bilinear, C5Bilinear
from .c1 import C1
from .deeplab import ASPP
from .ppm import PPM, PSP, PSPBilinear
from .upernet import UPerNet, UPerNetLite

__all__ = ["ASPP", "C1", "PPM", "PSP", "C1Bilinear", "C5Bilinear", "Decoder", "PSPBilinear", "UPerNet", "UPerNetLite"]
