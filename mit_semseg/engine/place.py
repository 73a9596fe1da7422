"""Where torchrun has put a process."""

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where torchrun has put this process; the defaults are those of a process on its own.

    Attributes:
        rank, size: of this process and of the job.
        local_rank, local_size: on this machine.
        restarts: how often torchrun has started the job anew.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0

    @classmethod
    def of_this_process(cls) -> "Place":
        """As the environment says."""
        env = os.environ
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(env):
            return cls()
        rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
        return cls(
            rank,
            size,
            int(env.get("LOCAL_RANK", rank)),
            int(env.get("LOCAL_WORLD_SIZE", size)),
            int(env.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )

    @property
    def job(self) -> str:
        """What tells this job, with its restarts, from others: its --rdzv_id, else the torchrun above this process."""
        name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        return f"{socket.gethostname()}:{os.getppid()}" if name in ("", "none") else name
