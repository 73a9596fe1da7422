"""Data augmentation: random crops, color jitter, blur and ClassMix. Random numbers come from the caller's generator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor

from .classes import IGNORE

CROP_TRIES = 10
HUE_FRACTION = 0.2  # maximum hue shift divided by `jitter`; small, because hue changes are the most visible
MIN_SIGMA = 0.1  # standard deviation of the weakest blur, in pixels
Encode = Callable[[np.ndarray], np.ndarray]  # function that converts raw label values to class indices


@dataclass(frozen=True)
class Augmentation:
    """Random crop, color jitter and blur of resized training images. By default, images are not changed.

    Attributes:
        crop: (height, width) of the random crop; None: no crop. Smaller sides of an image are not cropped.
        max_ratio: at most `CROP_TRIES` crops are drawn until every class has less than this fraction of the labelled
            pixels in the crop (`cat_max_ratio` in OpenMMLab). 1 accepts every crop.
        jitter: maximum relative change of brightness, contrast and saturation.
        blur: maximum standard deviation of the Gaussian blur in pixels. Half of the images are blurred.
    """

    crop: tuple[int, int] | None = None
    max_ratio: float = 1.0
    jitter: float = 0.0
    blur: float = 0.0

    @classmethod
    def from_options(cls, options) -> "Augmentation":
        """Build an Augmentation from the DATASET options. Missing options have their defaults."""
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
        """Augment a resized RGB image and its label. Return the new image and class indices (h, w) int64.

        `label` (H, W) has raw label values. After cropping, `encode` converts them to class indices.
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
    """Crop a raw label (H, W), see `Augmentation`. Return (left, top, right, bottom) and class indices in this box."""
    height, width = (min(side, wanted) for side, wanted in zip(label.shape, size, strict=True))
    for _ in range(CROP_TRIES):
        top = int(rng.integers(label.shape[0] - height + 1))
        left = int(rng.integers(label.shape[1] - width + 1))
        classes = encode(label[top : top + height, left : left + width])
        if max_ratio >= 1 or largest_class_fraction(classes) < max_ratio:
            break
    return (left, top, left + width, top + height), classes


def mix_classes(
    images: Sequence[Tensor], labels: Sequence[np.ndarray], probability: float, rng: Generator
) -> tuple[list[Tensor], list[np.ndarray]]:
    """Paste half of the classes of the previous image of a batch into each image with this probability (ClassMix).

    `images` (C, H, W) and `labels` (H, W) can have different sizes; pixels keep their positions. Return new images and
    labels. The source of a paste is the image as it was given. Olsson et al., 2021, https://arxiv.org/abs/2007.07936.
    """
    mixed = [
        paste_classes(images[i], labels[i], images[i - 1], labels[i - 1], rng)
        if rng.random() < probability
        else (images[i], labels[i])
        for i in range(len(images))
    ]
    return [image for image, _ in mixed], [label for _, label in mixed]


def paste_classes(
    image: Tensor, label: np.ndarray, source: Tensor, source_label: np.ndarray, rng: Generator
) -> tuple[Tensor, np.ndarray]:
    """Paste the pixels of half of the classes of `source` (rounded up), see `mix_classes`."""
    present = np.unique(source_label[source_label != IGNORE])
    chosen = rng.permutation(present)[: (len(present) + 1) // 2]
    height, width = (min(sides) for sides in zip(label.shape, source_label.shape, strict=True))
    area = np.s_[..., :height, :width]
    mask = np.isin(source_label[area], chosen)
    image, label = image.clone(), label.copy()
    label[area][mask] = source_label[area][mask]
    image[area] = torch.where(torch.from_numpy(mask), source[area], image[area])
    return image, label


def largest_class_fraction(classes: np.ndarray) -> float:
    """Return the fraction of labelled pixels that have the most frequent class, or 1 if no pixel is labelled."""
    counts = np.bincount(classes[classes != IGNORE].ravel(), minlength=1)
    return counts.max() / counts.sum() if counts.sum() else 1.0


def adjust_colors(
    image: Image.Image, brightness: float, contrast: float, saturation: float, hue: float, order=(0, 1, 2, 3)
) -> Image.Image:
    """Apply these changes in `order`: factors for brightness, contrast and saturation, and a hue shift of -0.5..0.5."""
    from torchvision.transforms.v2 import functional as F  # a slow import (one second) that is rarely needed

    functions = F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue
    amounts = brightness, contrast, saturation, hue
    for index in order:
        image = functions[index](image, float(amounts[index]))
    return image


def gaussian_blur(image: Image.Image, sigma: float) -> Image.Image:
    """Blur an image with a Gaussian of standard deviation `sigma` in pixels, truncated at three standard deviations."""
    from torchvision.transforms.v2 import functional as F

    # Reflection padding needs a kernel radius that is smaller than the width and height of the image.
    radius = max(0, min(int(np.ceil(3 * sigma)), *(side - 1 for side in image.size)))
    return F.gaussian_blur(image, [2 * radius + 1, 2 * radius + 1], [float(sigma), float(sigma)])
