import logging
import os

import offline
import pytest
import torch

from mit_semseg.lib.utils import disable_progress_bars

offline.forbid()

# The workers of pytest-xdist share two threads.
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))))
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
SEED = int(os.environ.get("SEED", 0))
pytest_plugins = ["server"]


def pytest_configure(config):
    """Hide GPUs unless pytest runs with `-m gpu`, so that all other tests run on the CPU on every machine."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads this when it is imported


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """Use a cache folder that is empty at the start of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIT_SEMSEG_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


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
