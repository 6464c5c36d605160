"""Starting a script once a rank, as torchrun does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("ranks_run.py")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(world: int, *args: object) -> list[str]:
    """The output of each rank; fails with the errors of one that failed. One rank: without torchrun's environment."""
    port = free_port()
    running = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        if world > 1:
            environment |= {name: str(value) for name, value in place.items()}
        command = [sys.executable, str(SCRIPT), *map(str, args)]
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate(timeout=900) for process in running]
    for process, (out, err) in zip(running, outputs, strict=True):
        assert process.returncode == 0, (out + err)[-5000:]
    return [out for out, _ in outputs]
