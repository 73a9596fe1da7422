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
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for GPUs run in the interpreter; read at Triton's import

pytest_plugins = ["server"]


@pytest.fixture(autouse=True)
def _random_numbers():
    """Every test draws the same ones, alone and among others; `SEED=1 pytest` tries others."""
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _log_as_it_was():
    """Scripts that run in this process set the toolkit's logger up; every test finds it as Python makes it."""
    logger = logging.getLogger("mit_semseg")
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
    disable_progress_bars(False)
