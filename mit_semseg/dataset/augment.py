"""Data augmentation: random crops, color jitter and blur. All random numbers come from the caller's generator."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image

from .classes import IGNORE

CROP_TRIES = 10
HUE_FRACTION = 0.2  # of the jitter strength, because hue changes are more visible than the others
MIN_SIGMA = 0.1  # standard deviation of the weakest blur, in pixels
Encode = Callable[[np.ndarray], np.ndarray]  # raw values to class indices


@dataclass(frozen=True)
class Augmentation:
    """Data augmentation besides the resize to a short side and the flip. The defaults change nothing."""

    scale: tuple[float, float] | None = None  # range of a random factor of the original size; None: to a short side
    crop: tuple[int, int] | None = None  # (height, width) of a random crop; smaller images are not cropped
    # Largest fraction of the labelled pixels of a crop that one class may have. A crop that exceeds it is drawn again,
    # up to `CROP_TRIES` times; the last one is used, as in OpenMMLab's `cat_max_ratio`.
    max_ratio: float = 1.0
    jitter: float = 0.0  # largest relative change of brightness, contrast and saturation; the hue turns a fifth as much
    blur: float = 0.0  # largest standard deviation of a Gaussian blur in pixels; half of the images are blurred

    @classmethod
    def from_options(cls, options) -> "Augmentation":
        """Build from the DATASET options; attributes that `options` lacks keep their default."""
        crop, scale = getattr(options, "crop_size", 0), getattr(options, "random_scale", ())
        crop = (crop, crop) if isinstance(crop, int) else tuple(crop)
        names = (("max_ratio", "cat_max_ratio"), ("jitter", "color_jitter"), ("blur", "blur"))
        others = {name: getattr(options, option) for name, option in names if hasattr(options, option)}
        return cls(tuple(scale) or None, crop if all(crop) else None, **others)

    def __call__(
        self, image: Image.Image, label: np.ndarray, encode: Encode, rng: Generator
    ) -> tuple[Image.Image, np.ndarray]:
        """Crop, recolor and blur a resized RGB image. Return the image and its class indices (h, w) int64.

        `label` has raw values (H, W). `encode` converts them to class indices, after cropping.
        """
        if self.crop:
            (left, top, right, bottom), classes = random_crop(label, encode, self.crop, rng, self.max_ratio)
            image = image.crop((left, top, right, bottom))
        else:
            classes = encode(label)
        if self.jitter:
            *factors, turn = rng.uniform(-self.jitter, self.jitter, 4)
            order = rng.permutation(4)
            image = adjust_colors(image, *(1 + factor for factor in factors), turn * HUE_FRACTION, order=order)
        if self.blur and rng.random() < 0.5:
            image = gaussian_blur(image, rng.uniform(min(MIN_SIGMA, self.blur), self.blur))
        return image, classes


def random_crop(
    label: np.ndarray, encode: Encode, size: tuple[int, int], rng: Generator, max_ratio: float = 1.0
) -> tuple[tuple[int, int, int, int], np.ndarray]:
    """Crop a raw label (H, W), see `Augmentation`. Return (left, top, right, bottom) and class indices of the crop."""
    height, width = (min(side, wanted) for side, wanted in zip(label.shape, size, strict=True))
    for _ in range(CROP_TRIES if max_ratio < 1 else 1):
        top = int(rng.integers(label.shape[0] - height + 1))
        left = int(rng.integers(label.shape[1] - width + 1))
        classes = encode(label[top : top + height, left : left + width])
        if max_ratio >= 1 or largest_class_fraction(classes) < max_ratio:
            break
    return (left, top, left + width, top + height), classes


def largest_class_fraction(classes: np.ndarray) -> float:
    """Return the fraction of the most frequent class among the labelled pixels; 1 if no pixel is labelled."""
    counts = np.bincount(classes[classes != IGNORE].ravel(), minlength=1)
    return counts.max() / counts.sum() if counts.sum() else 1.0


def adjust_colors(
    image: Image.Image, brightness: float, contrast: float, saturation: float, hue: float, order=(0, 1, 2, 3)
) -> Image.Image:
    """Change brightness, contrast and saturation by factors and turn the hue by -0.5..0.5, in the given order."""
    from torchvision.transforms.v2 import functional as F  # takes a second to import and is rarely needed

    functions = F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue
    amounts = brightness, contrast, saturation, hue
    for index in order:
        image = functions[index](image, float(amounts[index]))
    return image


def gaussian_blur(image: Image.Image, sigma: float) -> Image.Image:
    """Blur with a Gaussian of standard deviation `sigma` pixels, truncated at three standard deviations."""
    from torchvision.transforms.v2 import functional as F

    # The padding by reflection allows no kernel radius beyond the image.
    radius = max(0, min(int(np.ceil(3 * sigma)), *(side - 1 for side in image.size)))
    return F.gaussian_blur(image, [2 * radius + 1, 2 * radius + 1], [float(sigma), float(sigma)])
