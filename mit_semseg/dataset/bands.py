"""Images with any number of channels, in 8 or 16 bits or floating point (DATASET.channels, mean and std)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .image_io import ImageFileError
from .rasters import open_raster

PREVIEW_STD = 2.0  # previews show values from mean - 2 std to mean + 2 std


@dataclass(frozen=True)
class Bands:
    """Number of channels of the images, and mean and standard deviation of every channel, in units of the file."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_options(cls, options) -> "Bands | None":
        """Return the bands in the DATASET options; None for 8-bit RGB images with ImageNet normalization."""
        mean, std = getattr(options, "mean", ()), getattr(options, "std", ())
        return cls(tuple(mean), tuple(std)) if mean else None

    def read(self, path: str | os.PathLike) -> "BandImage":
        """Read an image file with rasterio, because Pillow reduces 16-bit colors to 8 bits.

        Raises:
            ImageFileError: the file cannot be read, or see `from_array`.
            UserError: rasterio is not installed.
        """
        with open_raster(path) as raster:
            return self.from_array(raster.read_with_nan(), str(path))

    def from_array(self, pixels: np.ndarray, name: str) -> "BandImage":
        """Return the image of an array (H, W, N), or (H, W) for one channel.

        Raises:
            ImageFileError: the number of channels or the dtype is wrong. The message contains `name`.
        """
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        channels = len(self.mean)
        if pixels.ndim != 3 or pixels.shape[2] != channels or not pixels.size:
            shape = "x".join(map(str, pixels.shape))
            raise ImageFileError(f"{name}: expected {channels} channels (DATASET.channels), got an image of {shape}")
        if pixels.dtype.kind not in "uif":
            raise ImageFileError(f"{name}: pixels of type {pixels.dtype} are not supported; save integers or floats")
        return BandImage(pixels, self)

    @staticmethod
    def size(path: str | os.PathLike) -> tuple[int, int]:
        """Read (width, height) of an image file from its header."""
        with open_raster(path) as raster:
            return raster.size


@dataclass(frozen=True)
class BandImage:
    """An image with any number of channels."""

    pixels: np.ndarray  # (H, W, N), integers or floats
    bands: Bands
    info: dict = field(default_factory=lambda: {"orientation": 1})

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[1::-1]

    def flip_left_right(self) -> "BandImage":
        return BandImage(self.pixels[:, ::-1], self.bands)

    def crop(self, box: Sequence[int]) -> "BandImage":
        left, top, right, bottom = box
        return BandImage(self.pixels[top:bottom, left:right], self.bands)

    def resize(self, size: tuple[int, int]) -> "BandImage":
        """Resize to (width, height) with PyTorch's antialiased bilinear filter in float32."""
        if tuple(size) == self.size:
            return self
        x = torch.from_numpy(np.ascontiguousarray(self.pixels, np.float32)).permute(2, 0, 1)[None]
        x = F.interpolate(x, size[::-1], mode="bilinear", antialias=True)
        return BandImage(x[0].permute(1, 2, 0).numpy(), self.bands)

    def to_tensor(self) -> Tensor:
        """Return (value - mean) / std, (N, H, W) float32; values that are not finite become 0, the mean."""
        x = (self.pixels.astype(np.float32) - np.float32(self.bands.mean)) / np.float32(self.bands.std)
        x = np.nan_to_num(x, copy=False, nan=0, posinf=0, neginf=0)
        return torch.from_numpy(x).permute(2, 0, 1).contiguous()

    def preview(self) -> Image.Image:
        """Return an RGB image of the first three channels; fewer channels become gray."""
        x = self.to_tensor()[: 3 if len(self.bands.mean) >= 3 else 1].expand(3, -1, -1)
        x = (x / PREVIEW_STD + 1) * 127.5
        return Image.fromarray(x.clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
