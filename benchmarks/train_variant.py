"""train.py with a change that the package does not have, to measure it with benchmarks/learning.py.

    python benchmarks/train_variant.py {rand_augment,batch_statistics} --cfg FILE [KEY VALUE ...]

The other arguments are those of train.py.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.v2 import functional as F

from mit_semseg.dataset import datasets
from mit_semseg.lib.nn import batchnorm

OPERATIONS = 2  # number of operations that RandAugment applies to an image


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


def batch_statistics() -> None:
    """Normalize after global pooling by the statistics of the batch, also in steps with few images."""
    batchnorm.MIN_IMAGES = 0


VARIANTS = {"rand_augment": rand_augment, "batch_statistics": batch_statistics}

if __name__ == "__main__":
    VARIANTS[sys.argv.pop(1)]()
    runpy.run_path(str(Path(__file__).parents[1] / "train.py"), run_name="__main__")
