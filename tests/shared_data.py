"""Real data that lies beside a checkout on some machines; tests that use it are skipped elsewhere."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared"


def shared(path: str) -> Path:
    """A file or folder of the real data; skips the test that asks where there is none."""
    found = FOLDER / path
    if not found.exists():
        pytest.skip(f"needs the real data folder ({path})")
    return found
