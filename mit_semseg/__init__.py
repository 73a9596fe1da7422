"""Semantic segmentation networks: training, evaluation and inference on ADE20K and any other labelled images."""

__version__ = "3.0.0"
