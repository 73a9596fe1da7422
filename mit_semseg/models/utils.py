"""Names of version 2: download of a state dict."""

from pathlib import Path
from urllib.parse import urlsplit

import torch

from ..lib.download import download


def load_url(url: str, model_dir: str = "./pretrained", map_location=None) -> dict:
    """The state dict at an address, downloaded to a folder unless it is there.

    Raises:
        DownloadError: it cannot be had.
    """
    path = Path(model_dir, Path(urlsplit(url).path).name)
    if not path.is_file():
        download(url, path)
    return torch.load(path, map_location=map_location, weights_only=True)
