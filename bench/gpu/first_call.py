"""Stage: what a first call on this machine meets: which backend it gets, how long that takes, what is left out."""

from __future__ import annotations

import sys
import time

import torch

import trapo_kernels as tk
from bench.gpu.rows import Rows, options
from trapo_kernels.verify import keep

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    chosen = options(__doc__, arguments)
    rows = Rows(chosen.rows)
    device = torch.device(chosen.device, 0) if chosen.device == "cuda" else torch.device(chosen.device)
    known = bool(keep.read(device))  # from an earlier run: then the first call has nothing to try
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        picked = tk.default_backend(device)
        seconds.append(time.perf_counter() - start)
    left_out = {b.name: b.left_out or b.missing for b in tk.backends().values() if b.left_out or b.missing}
    verdicts = [str(verdict) for verdict in keep.read(device).values()]
    rows.add(
        what="first call", picked=picked, known=known, first_s=round(seconds[0], 3),
        then_us=round(1e6 * seconds[1], 1), verdicts=verdicts, left_out=left_out,
    )  # fmt: skip
    return int(chosen.device == "cuda" and picked == "torch")


if __name__ == "__main__":
    sys.exit(main())
