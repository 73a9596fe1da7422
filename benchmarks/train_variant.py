"""train.py with a change that the package does not have, to measure it with benchmarks/learning.py.

    python benchmarks/train_variant.py {rand_augment,class_mix,batch_statistics} --cfg FILE [KEY VALUE ...]

The other arguments are those of train.py.
"""

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mit_semseg.dataset import datasets
from mit_semseg.lib.nn import batchnorm

OPERATIONS = 2  # number of operations that RandAugment applies to an image
PROBABILITY = 0.5  # probability that ClassMix changes an image


def _factor(rng: np.random.Generator) -> float:
    return float(1 + rng.choice((-1, 1)) * rng.uniform(0, 0.9))


COLOR_OPERATIONS: tuple[Callable[[Image.Image, np.random.Generator], Image.Image], ...] = (
    lambda image, rng: image,
    lambda image, rng: F.adjust_brightness(image, _factor(rng)),
    lambda image, rng: F.adjust_contrast(image, _factor(rng)),
    lambda image, rng: F.adjust_saturation(image, _factor(rng)),
    lambda image, rng: F.adjust_sharpness(image, _factor(rng)),
    lambda image, rng: F.posterize(image, int(rng.integers(4, 9))),
    lambda image, rng: F.solarize(image, int(rng.integers(128, 256))),
    lambda image, rng: F.autocontrast(image),
    lambda image, rng: F.equalize(image),
)


def rand_augment() -> None:
    """Apply the color operations of RandAugment (Cubuk et al., 2020) in random strength to every training image."""
    original = datasets.Augmentation.__call__

    def augment(self, image, label, encode, rng):
        image, classes = original(self, image, label, encode, rng)
        for index in rng.integers(len(COLOR_OPERATIONS), size=OPERATIONS):
            image = COLOR_OPERATIONS[index](image, rng)
        return image, classes

    datasets.Augmentation.__call__ = augment


def class_mix() -> None:
    """Paste half of the classes of another image of the batch (ClassMix; Olsson et al., 2021)."""
    original = datasets.pad_batch

    def pad_mixed_batch(images: Sequence[Tensor], labels: Sequence[np.ndarray], *args) -> dict[str, Tensor]:
        rng = np.random.default_rng(int(sum(int(image.float().sum()) for image in images)))
        mixed = [
            mix(images[i], labels[i], images[i - 1], labels[i - 1], rng)
            if rng.random() < PROBABILITY
            else (images[i], labels[i])
            for i in range(len(images))
        ]
        return original(*zip(*mixed, strict=True), *args)

    datasets.pad_batch = pad_mixed_batch


def mix(
    image: Tensor, label: np.ndarray, source: Tensor, source_label: np.ndarray, rng: np.random.Generator
) -> tuple[Tensor, np.ndarray]:
    """Paste half of the classes of `source` into `image` (3, H, W); return the new image and label (H, W)."""
    height, width = (min(a, b) for a, b in zip(label.shape, source_label.shape, strict=True))
    present = np.unique(source_label[source_label >= 0])
    chosen = rng.permutation(present)[: (len(present) + 1) // 2]
    mask = np.isin(source_label[:height, :width], chosen)
    image, label = image.clone(), label.copy()
    label[:height, :width][mask] = source_label[:height, :width][mask]
    area = image[:, :height, :width]
    area[:] = torch.where(torch.from_numpy(mask), source[:, :height, :width], area)
    return image, label


def batch_statistics() -> None:
    """Normalize after global pooling by the statistics of the batch, also in steps with few images."""
    batchnorm.MIN_IMAGES = 0


VARIANTS = {"rand_augment": rand_augment, "class_mix": class_mix, "batch_statistics": batch_statistics}

if __name__ == "__main__":
    VARIANTS[sys.argv.pop(1)]()
    runpy.run_path(str(Path(__file__).parents[1] / "train.py"), run_name="__main__")
