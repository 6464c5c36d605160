"""DeepSpeed's ZeRO-3, for real, on two processes of this machine: heads are whole where they are used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="deepspeed is not installed here: `make test-deepspeed` has a venv of its own")
pytest.importorskip("trl", reason="trl is not installed")


def test_two_ranks_of_zero3_step_as_one_process_does():
    script = Path(__file__).with_name("zero3_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29546", str(script)]
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(line.endswith(" ok") for line in done.stdout.splitlines()) == 2 * 5
