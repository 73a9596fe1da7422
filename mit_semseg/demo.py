"""Entry point of `python -m mit_semseg.demo`."""

from .cli.common import run
from .cli.demo.app import main

if __name__ == "__main__":
    run(main)
