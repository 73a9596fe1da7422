"""Small datasets and networks for the tests."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import nn

from mit_semseg.models import SegmentationModule
from mit_semseg.models.decoders import C1
from mit_semseg.models.layers import conv_bn_relu


def options(**changes) -> SimpleNamespace:
    """Return DATASET options for three unnamed classes (label values 1 to 3; 0 is ignored)."""
    values = {
        "imgSizes": (40, 56),
        "imgMaxSize": 120,
        "padding_constant": 8,
        "segm_downsampling_rate": 8,
        "random_flip": True,
        "num_class": 3,
        "classes": "",
        "ignore_values": (),
    }
    return SimpleNamespace(**{**values, **changes})


def write_pairs(folder, sizes, *, values=(0, 1, 2, 3), seed=0):
    """Write images/NN.png and annotations/NN.png for each (width, height); a label has 4 x 4 blocks of one value."""
    rng = np.random.default_rng(seed)
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, (width, height) in enumerate(sizes):
        blocks = rng.choice(values, (4, 4)).astype(np.uint8)
        label = Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
        noise = rng.integers(0, 60, (height, width, 3))
        pixels = (np.asarray(label)[..., None] * np.array([60, 40, 20]) % 190 + noise).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:02d}.png")
        label.save(folder / "annotations" / f"{i:02d}.png")
    return folder


def write_data_set(folder):
    """Write a small dataset to train/ and val/, with portrait and landscape images."""
    write_pairs(folder / "train", [(60, 40), (40, 60), (52, 44), (44, 64)], seed=1)
    write_pairs(folder / "val", [(50, 40), (40, 56), (64, 48)], seed=3)
    return folder


class _Block(nn.Sequential):
    is_block = True


class TinyEncoder(nn.Module):
    """A small encoder with feature maps at strides 4 and 8."""

    out_channels, output_stride = (8, 16), 8

    def __init__(self):
        super().__init__()
        self.stem = _Block(conv_bn_relu(3, 8, stride=2), conv_bn_relu(8, 8, stride=2))
        self.deep = conv_bn_relu(8, 16, stride=2)

    def forward(self, x, return_feature_maps=False):
        first = self.stem(x)
        return [first, self.deep(first)] if return_feature_maps else [self.deep(first)]


def tiny_module(num_class=3, seed=0, crit=None) -> SegmentationModule:
    """Return a network with a few thousand parameters."""
    torch.manual_seed(seed)
    return SegmentationModule(TinyEncoder(), C1((8, 16), num_class, deepsup=True), crit, 0.4)
