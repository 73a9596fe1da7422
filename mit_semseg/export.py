"""`python -m mit_semseg.export`: see `mit_semseg.apps.export`."""

from .apps.cli import run
from .apps.export import export, main

__all__ = ["export"]

if __name__ == "__main__":
    run(main)
