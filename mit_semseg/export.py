"""Entry point of `python -m mit_semseg.export`."""

from .cli.common import run
from .cli.export import export, main

__all__ = ["export"]

if __name__ == "__main__":
    run(main)
