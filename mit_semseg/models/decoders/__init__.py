"""Decoders, which compute logits from a list of feature maps."""

from .base import Decoder
from .c1 import C1, C1Bilinear, C5Bilinear
from .ppm import ASPP, PPM, PSP, PSPBilinear
from .upernet import UPerNet, UPerNetLite, UPerNetTiny

__all__ = [
    "ASPP",
    "C1",
    "PPM",
    "PSP",
    "C1Bilinear",
    "C5Bilinear",
    "Decoder",
    "PSPBilinear",
    "UPerNet",
    "UPerNetLite",
    "UPerNetTiny",
]
