import os

import torch

torch.set_num_threads(2)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for GPUs run in the interpreter; read at Triton's import

pytest_plugins = ["server"]
