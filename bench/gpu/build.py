"""Stage: the CUDA extension, compiled by nvcc for this machine's GPU alone, where it is not here yet."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import torch

import trapo_kernels as tk
from bench.gpu.rows import Rows, options
from bench.gpu.running import ROOT

__all__ = ["for_capability", "main"]


def for_capability(command: list[str], capability: tuple[int, int]) -> list[str]:
    """Returns an nvcc command that makes code for one GPU instead of all: for its own code where the command has it,
    else from the PTX."""
    number = "{}{}".format(*capability)
    all_code = [part for part in command if part.startswith("-gencode=")]
    fitting = [part for part in all_code if part.rpartition("sm_")[2].rstrip("a") == number]
    fitting = fitting or [part for part in all_code if "code=compute_" in part]
    return [part for part in command if part not in all_code or part in fitting]


def compile_here(out: str) -> subprocess.CompletedProcess[str]:
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, {"TRAPO_KERNELS_BUILD": "none"}):
        setup: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"))
    command = for_capability(setup["nvcc_command"](out), torch.cuda.get_device_capability())
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def main(arguments: list[str] | None = None) -> int:
    chosen = options(__doc__, arguments)
    rows = Rows(chosen.rows)
    reason = tk.backends()["cuda"].missing
    if reason is None or chosen.device == "cpu" or not torch.cuda.is_available():
        rows.add(what="build", done=False, why="it is here" if reason is None else reason)
        return 0
    start = time.monotonic()
    library = ROOT / "trapo_kernels" / "_cuda.so"
    beside = library.with_suffix(".new.so")
    try:
        done = compile_here(str(beside))
    except OSError as error:  # no nvcc
        rows.add(what="build", done=False, why=f"{reason}; nvcc: {error}")
        return 1
    if done.returncode == 0:
        os.replace(beside, library)
    # Whether it is here now only a new process can say.
    ask = "import trapo_kernels as tk; print(tk.backends()['cuda'])"
    found = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    rows.add(
        what="build", done=done.returncode == 0, seconds=round(time.monotonic() - start, 1), why=reason,
        errors=errors[:3], then=found.stdout.strip(),
    )  # fmt: skip
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
