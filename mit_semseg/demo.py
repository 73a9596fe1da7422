"""`python -m mit_semseg.demo`: see `mit_semseg.cli.demo.app`."""

from .cli.common import run
from .cli.demo.app import main

if __name__ == "__main__":
    run(main)
