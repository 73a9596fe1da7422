"""Data augmentation: random crops, color jitter and blur. All random numbers come from the caller's generator."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image

from .classes import IGNORE

CROP_TRIES = 10
HUE_FRACTION = 0.2  # hue jitter as a fraction of the jitter strength, because hue changes are the most visible
MIN_SIGMA = 0.1  # standard deviation of the weakest blur, in pixels
Encode = Callable[[np.ndarray], np.ndarray]  # function from raw label values to class indices


@dataclass(frozen=True)
class Augmentation:
    """Crop, color jitter and blur for training images after the resize. The defaults change nothing.

    Attributes:
        crop: (height, width) of a random crop, or None. Smaller images are not cropped.
        max_ratio: a crop is drawn again, at most `CROP_TRIES` times, while one class has at least this fraction of its
            labelled pixels (`cat_max_ratio` in OpenMMLab). 1 accepts every crop.
        jitter: maximum relative change of brightness, contrast and saturation.
        blur: maximum standard deviation of the Gaussian blur in pixels. Half of the images are blurred.
    """

    crop: tuple[int, int] | None = None
    max_ratio: float = 1.0
    jitter: float = 0.0
    blur: float = 0.0

    @classmethod
    def from_options(cls, options) -> "Augmentation":
        """Build from the DATASET options; attributes that `options` lacks have their default."""
        crop = getattr(options, "crop_size", 0)
        crop = (crop, crop) if isinstance(crop, int) else tuple(crop)
        return cls(
            crop=crop if all(crop) else None,
            max_ratio=getattr(options, "cat_max_ratio", cls.max_ratio),
            jitter=getattr(options, "color_jitter", cls.jitter),
            blur=getattr(options, "blur", cls.blur),
        )

    def __call__(
        self, image: Image.Image, label: np.ndarray, encode: Encode, rng: Generator
    ) -> tuple[Image.Image, np.ndarray]:
        """Augment a resized RGB image. Return the image and its class indices (h, w) int64.

        `label` has raw values (H, W). `encode` converts them to class indices, after cropping.
        """
        if self.crop:
            box, classes = random_crop(label, encode, self.crop, rng, self.max_ratio)
            image = image.crop(box)
        else:
            classes = encode(label)
        if self.jitter:
            *factors, hue = rng.uniform(-self.jitter, self.jitter, 4)
            order = rng.permutation(4)
            image = adjust_colors(image, *(1 + factor for factor in factors), hue * HUE_FRACTION, order=order)
        if self.blur and rng.random() < 0.5:
            image = gaussian_blur(image, rng.uniform(min(MIN_SIGMA, self.blur), self.blur))
        return image, classes


def random_crop(
    label: np.ndarray, encode: Encode, size: tuple[int, int], rng: Generator, max_ratio: float = 1.0
) -> tuple[tuple[int, int, int, int], np.ndarray]:
    """Crop a raw label (H, W), see `Augmentation`. Return (left, top, right, bottom) and class indices of the crop."""
    height, width = (min(side, wanted) for side, wanted in zip(label.shape, size, strict=True))
    for _ in range(CROP_TRIES):
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
    """Multiply brightness, contrast and saturation by factors and shift the hue by -0.5..0.5, in the given order."""
    from torchvision.transforms.v2 import functional as F  # the import takes a second and is rarely needed

    functions = F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue
    amounts = brightness, contrast, saturation, hue
    for index in order:
        image = functions[index](image, float(amounts[index]))
    return image


def gaussian_blur(image: Image.Image, sigma: float) -> Image.Image:
    """Blur with a Gaussian of standard deviation `sigma` pixels, truncated at three standard deviations."""
    from torchvision.transforms.v2 import functional as F

    # The kernel radius must be smaller than the image, because the image is padded by reflection.
    radius = max(0, min(int(np.ceil(3 * sigma)), *(side - 1 for side in image.size)))
    return F.gaussian_blur(image, [2 * radius + 1, 2 * radius + 1], [float(sigma), float(sigma)])
