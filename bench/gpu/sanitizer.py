"""Stage: compute-sanitizer (memcheck, racecheck, synccheck) over the CUDA kernels, where it exists."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time

import trapo_kernels as tk
from bench.gpu.rows import Rows, options
from bench.gpu.running import ROOT

__all__ = ["main"]

TOOLS = {"memcheck": ("--leak-check", "no"), "racecheck": (), "synccheck": ()}
_FOUND = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def summary(text: str) -> int | None:
    """Returns how many errors a tool found; None where it says nothing of it."""
    found = _FOUND.findall(text)
    return int(found[-1]) if found else None


def main(arguments: list[str] | None = None) -> int:
    chosen = options(__doc__, arguments)
    rows, bad = Rows(chosen.rows), False
    backend, program = "cuda", shutil.which("compute-sanitizer")
    absent = "compute-sanitizer is not here" if program is None else tk.backends()[backend].missing
    for tool, more in TOOLS.items():
        if program is None or absent is not None:
            rows.add(what=tool, left_out=absent)
            continue
        start = time.monotonic()
        done = subprocess.run(
            [program, "--tool", tool, *more, sys.executable, "-m", "bench.gpu.smoke", "--backend", backend, "--tiny",
             "--device", chosen.device, "--rows", f"{chosen.rows}.{tool}"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        text = done.stdout + done.stderr
        errors = summary(text)
        bad |= errors != 0
        lines = [line.strip("= \t")[:200] for line in text.splitlines() if line.startswith("=========")]
        rows.add(
            what=tool, errors=errors, status=done.returncode, seconds=round(time.monotonic() - start, 1),
            first=lines[1:6] if errors else [],
        )  # fmt: skip
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
