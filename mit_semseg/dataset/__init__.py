"""From files on disk to batches."""

from .classes import ClassTable, class_table
from .datasets import TestDataset, TrainDataset, ValDataset
from .transforms import imresize

__all__ = ["ClassTable", "TestDataset", "TrainDataset", "ValDataset", "class_table", "imresize"]
