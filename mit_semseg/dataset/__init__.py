"""Find and decode images and labels, augment them, and build batches."""

from .base import BaseDataset, img_transform, round2nearest_multiple
from .classes import ClassTable, class_table
from .datasets import TestDataset, TrainDataset, ValDataset
from .transforms import imresize

__all__ = [
    "BaseDataset",
    "ClassTable",
    "TestDataset",
    "TrainDataset",
    "ValDataset",
    "class_table",
    "img_transform",
    "imresize",
    "round2nearest_multiple",
]
