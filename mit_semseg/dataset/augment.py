"""Variation of training pictures: crops, colours, sharpness. Pure functions; all draws come from the caller."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .classes import IGNORE

CROP_TRIES = 10  # places tried for a crop that no class dominates
HUE_SHARE = 0.2  # of the jitter's strength: hue shifts tell on the picture more than the others
SMALLEST_SIGMA = 0.1  # of a blur, pixels


@dataclass(frozen=True)
class Augmentation:
    """What is varied beside size and mirroring; the defaults vary nothing.

    Attributes:
        scale: smallest and largest factor of the picture's own size, drawn uniformly; None leaves the size to the
            short sides of the data set.
        crop: (height, width) of a region cut out at a random place; a smaller picture is not cut.
        max_ratio: share of a crop's labelled pixels that one class may have, in 0..1; a crop with more is drawn again,
            a few times.
        jitter: largest relative change of brightness, contrast and saturation; hue changes by a fifth of it at most, in
            turns of the colour circle.
        blur: largest standard deviation of a Gaussian blur, pixels; half of the pictures are blurred.
    """

    scale: tuple[float, float] | None = None
    crop: tuple[int, int] | None = None
    max_ratio: float = 1.0
    jitter: float = 0.0
    blur: float = 0.0

    def __call__(
        self, image: Image.Image, label: np.ndarray, rng: np.random.Generator
    ) -> tuple[Image.Image, np.ndarray]:
        """Crop and recolour a picture that has its size already.

        Args:
            image: RGB.
            label: (H, W) class indices.
            rng: of the draws.
        """
        if self.crop:
            left, top, right, bottom = draw_crop(label, self.crop, rng, self.max_ratio)
            image, label = image.crop((left, top, right, bottom)), label[top:bottom, left:right]
        if self.jitter:
            *factors, turn = rng.uniform(-self.jitter, self.jitter, 4)
            image = recolor(image, *(1 + factor for factor in factors), turn * HUE_SHARE, order=rng.permutation(4))
        if self.blur and rng.random() < 0.5:
            image = blurred(image, rng.uniform(min(SMALLEST_SIGMA, self.blur), self.blur))
        return image, label


def draw_crop(
    label: np.ndarray, size: tuple[int, int], rng: np.random.Generator, max_ratio: float = 1.0
) -> tuple[int, int, int, int]:
    """A random region of a picture.

    Args:
        label: (H, W) class indices.
        size: (height, width) of the region; at most the picture is taken.
        rng: of the draws.
        max_ratio: see `Augmentation`; of several tries the last one counts, as in OpenMMLab's `cat_max_ratio`.

    Returns:
        (left, top, right, bottom), pixels.
    """
    height, width = (min(own, wanted) for own, wanted in zip(label.shape, size, strict=True))
    for _ in range(CROP_TRIES if max_ratio < 1 else 1):
        top = int(rng.integers(label.shape[0] - height + 1))
        left = int(rng.integers(label.shape[1] - width + 1))
        if max_ratio >= 1 or largest_share(label[top : top + height, left : left + width]) < max_ratio:
            break
    return left, top, left + width, top + height


def largest_share(label: np.ndarray) -> float:
    """Share of the most frequent class among the labelled pixels; 1 where nothing is labelled."""
    counts = np.bincount(label[label != IGNORE].ravel(), minlength=1)
    return counts.max() / counts.sum() if counts.sum() else 1.0


def recolor(
    image: Image.Image, brightness: float, contrast: float, saturation: float, hue: float, order=(0, 1, 2, 3)
) -> Image.Image:
    """Change the colours of an RGB picture.

    Args:
        brightness, contrast, saturation: factors, 1 changes nothing.
        hue: turn of the colour circle, -0.5..0.5.
        order: in which the four are applied.
    """
    from torchvision.transforms.v2 import functional as F  # takes a second to import, and few runs need it

    steps = (
        (F.adjust_brightness, brightness),
        (F.adjust_contrast, contrast),
        (F.adjust_saturation, saturation),
        (F.adjust_hue, hue),
    )
    for number in order:
        adjust, amount = steps[number]
        image = adjust(image, float(amount))
    return image


def blurred(image: Image.Image, sigma: float) -> Image.Image:
    """Gaussian blur of a standard deviation in pixels, cut off at three of them."""
    from torchvision.transforms.v2 import functional as F

    # The kernel is mirrored at the borders, so it may not reach over the whole picture.
    reach = max(0, min(int(np.ceil(3 * sigma)), *(side - 1 for side in image.size)))
    return F.gaussian_blur(image, [2 * reach + 1, 2 * reach + 1], [float(sigma), float(sigma)])
