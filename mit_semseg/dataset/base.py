"""Base class for custom data sets, with the attributes and methods of version 2."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .records import load_records
from .transforms import normalize, round_up


def round2nearest_multiple(x: int, p: int) -> int:
    """The smallest multiple of `p` that is at least `x`."""
    return round_up(x, p)


def img_transform(img: Image.Image | np.ndarray) -> Tensor:
    """RGB picture, (H, W, 3) uint8 -> (3, H, W) float32, normalized with ImageNet's means and deviations."""
    return normalize(Image.fromarray(np.asarray(img, np.uint8)))


class BaseDataset(Dataset):
    """Base class of data sets over a list of images; a subclass implements `__getitem__` and `__len__`.

    Args:
        odgt: path of a list, or records such as `[{"fpath_img": path}]`.
        opt: object with imgSizes, imgMaxSize, padding_constant.
        kwargs: of `parse_input_list`.

    Attributes:
        list_sample, num_sample: records, and how many.
        imgSizes, imgMaxSize, padding_constant: of `opt`.
    """

    def __init__(self, odgt: str | Sequence[dict], opt, **kwargs):
        self.imgSizes, self.imgMaxSize, self.padding_constant = opt.imgSizes, opt.imgMaxSize, opt.padding_constant
        self.parse_input_list(odgt, **kwargs)

    def parse_input_list(
        self, odgt: str | Sequence[dict], max_sample: int = -1, start_idx: int = -1, end_idx: int = -1
    ) -> None:
        """Set `list_sample` and `num_sample`.

        Args:
            max_sample: number of records to use, from the first on; -1 uses all.
            start_idx, end_idx: then take this slice; -1 all.
        """
        records = load_records(odgt)
        records = records[:max_sample] if max_sample > 0 else records
        self.list_sample = records[start_idx:end_idx] if start_idx >= 0 and end_idx >= 0 else records
        self.num_sample = len(self.list_sample)

    def img_transform(self, img: Image.Image | np.ndarray) -> Tensor:
        """See the function `img_transform`."""
        return img_transform(img)

    def segm_transform(self, segm: Image.Image | np.ndarray) -> Tensor:
        """Label (H, W) of ADE20K -> (H, W) int64: class indices, -1 where unlabelled."""
        return torch.from_numpy(np.array(segm)).long() - 1

    def round2nearest_multiple(self, x: int, p: int) -> int:
        """See the function `round2nearest_multiple`."""
        return round2nearest_multiple(x, p)
