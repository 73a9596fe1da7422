import logging
import os

import offline
import pytest
import torch

from mit_semseg.lib.utils import disable_progress_bars

offline.forbid()

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
SEED = int(os.environ.get("SEED", 0))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads this when it is imported

pytest_plugins = ["server"]


@pytest.fixture(autouse=True)
def _seed():
    """Seed PyTorch before every test; `SEED=1 pytest` uses another seed."""
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _reset_logger():
    """Before every test, remove the log handlers and settings of scripts that ran in this process."""
    logger = logging.getLogger("mit_semseg")
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
    disable_progress_bars(False)
