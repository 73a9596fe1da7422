"""Real data in the folder `shared` next to the repository; tests that need missing data are skipped."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared"


def shared(path: str) -> Path:
    """Return the path of a file or folder in `FOLDER`; skip the test if this path does not exist."""
    found = FOLDER / path
    if not found.exists():
        pytest.skip(f"needs real data: {found} does not exist")
    return found
