"""Real data in a folder next to the checkout; tests that need it are skipped if it does not exist."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared"


def shared(path: str) -> Path:
    """Return the path of a file or folder in the real data; skip the test if it does not exist."""
    found = FOLDER / path
    if not found.exists():
        pytest.skip(f"needs the real data folder ({path})")
    return found
