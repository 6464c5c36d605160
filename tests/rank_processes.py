"""Starting a program once a rank, as torchrun does."""

from __future__ import annotations

import socket
import subprocess

import forked


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(world: int, *args: object) -> list[str]:
    """The output of each rank; fails with the errors of one that failed. One rank: without torchrun's environment."""
    done = start_ranks(world, *args)
    for rank in done:
        assert rank.returncode == 0, (rank.stdout + rank.stderr)[-5000:]
    return [rank.stdout for rank in done]


def start_ranks(world: int, *args: object) -> list[subprocess.CompletedProcess]:
    """What became of each rank, whatever that is."""
    port, commands = free_port(), []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {"GLOO_SOCKET_IFNAME": "lo", **(place if world > 1 else {})}
        commands.append(forked.Command("ranks_run:main", args, environment=environment))
    return forked.run_together(commands, timeout=900)
