"""Base class for custom datasets that use the interface of version 2."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .records import load_records
from .transforms import normalize
from .transforms import round_up as round2nearest_multiple


def img_transform(img: Image.Image | np.ndarray) -> Tensor:
    """Convert an RGB image (H, W, 3) uint8 to a tensor (3, H, W) float32 with ImageNet normalization."""
    return normalize(Image.fromarray(np.asarray(img, np.uint8)))


class BaseDataset(Dataset):
    """Base class for datasets over a list of images. Subclasses implement `__getitem__` and `__len__`.

    Args:
        odgt, kwargs: arguments of `parse_input_list`. `odgt` is a path, or a list such as `[{"fpath_img": path}]`.
        opt: object with imgSizes, imgMaxSize and padding_constant, which are copied to the dataset.
    """

    img_transform = staticmethod(img_transform)
    round2nearest_multiple = staticmethod(round2nearest_multiple)

    def __init__(self, odgt: str | Sequence[dict], opt, **kwargs):
        self.imgSizes, self.imgMaxSize, self.padding_constant = opt.imgSizes, opt.imgMaxSize, opt.padding_constant
        self.parse_input_list(odgt, **kwargs)

    def parse_input_list(
        self, odgt: str | Sequence[dict], max_sample: int = -1, start_idx: int = -1, end_idx: int = -1
    ) -> None:
        """Set `list_sample` to the first `max_sample` records, or to their slice `start_idx:end_idx`; -1 means all."""
        records = load_records(odgt)
        records = records[:max_sample] if max_sample > 0 else records
        self.list_sample = records[start_idx:end_idx] if start_idx >= 0 and end_idx >= 0 else records
        self.num_sample = len(self.list_sample)

    def segm_transform(self, segm: Image.Image | np.ndarray) -> Tensor:
        """Convert an ADE20K label (H, W) to a tensor of class indices (H, W) int64; unlabelled pixels become -1."""
        return torch.from_numpy(np.array(segm)).long() - 1
