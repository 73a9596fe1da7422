"""Deprecated function from version 2."""

from pathlib import Path
from urllib.parse import urlsplit

import torch

from .pretrained import download


def load_url(url: str, model_dir: str = "./pretrained", map_location=None) -> dict:
    """Download a state dict to `model_dir`, unless the file exists there, and load it."""
    path = download(url, Path(model_dir, Path(urlsplit(url).path).name))
    return torch.load(path, map_location=map_location, weights_only=True)
