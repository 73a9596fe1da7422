"""`python -m mit_semseg.demo`: see `mit_semseg.apps.demo`."""

from .apps.cli import run
from .apps.demo import main

if __name__ == "__main__":
    run(main)
