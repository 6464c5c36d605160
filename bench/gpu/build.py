"""Stage: the CUDA extension, compiled for this machine's GPU where it is not here yet."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch

import trapo_kernels as tk
from bench.gpu.rows import Rows, options
from bench.gpu.running import ROOT

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    chosen = options(__doc__, arguments)
    rows = Rows(chosen.rows)
    reason = tk.backends()["cuda"].missing
    if reason is None or chosen.device == "cpu" or not torch.cuda.is_available():
        rows.add(what="build", done=False, why="it is here" if reason is None else reason)
        return 0
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, capture_output=True, text=True,
        check=False, env={**os.environ, "TRAPO_KERNELS_CUDA": "1"},
    )  # fmt: skip
    # Whether it is here now only a new process can say.
    ask = "import trapo_kernels as tk; print(tk.backends()['cuda'])"
    found = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("trapo_kernels:")]
    rows.add(
        what="build", done=done.returncode == 0, seconds=round(time.monotonic() - start, 1), why=reason,
        said="; ".join(said), then=found.stdout.strip(),
    )  # fmt: skip
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
