"""Stage: what this machine is, and which backends and peers are here."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from typing import Any

import torch

import trapo_kernels as tk
from bench.gpu.rows import Rows, options
from bench.providers import MODULES, installed

__all__ = ["device_name", "main"]

_TOOLS = {
    "nvidia-smi": ("--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit", "--format=csv,noheader"),
    "nvcc": ("--version",),
    "compute-sanitizer": ("--version",),
}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def _tool(name: str, arguments: tuple[str, ...]) -> str:
    if shutil.which(name) is None:
        return "not here"
    done = subprocess.run([name, *arguments], capture_output=True, text=True, check=False, timeout=20)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"status {done.returncode}"


def _version(module: str) -> str:
    try:
        return str(__import__(module).__version__)
    except Exception as error:
        return f"not here ({type(error).__name__})"


def _card() -> dict[str, Any]:
    card = torch.cuda.get_device_properties(0)
    found = {"memory_gb": card.total_memory / 1e9, "multiprocessors": card.multi_processor_count}
    return {**found, "capability": f"{card.major}.{card.minor}", "l2_mb": getattr(card, "L2_cache_size", 0) / 2**20}


def main(arguments: list[str] | None = None) -> int:
    chosen = options(__doc__, arguments)
    rows = Rows(chosen.rows)
    rows.add(
        what="machine", device=device_name(chosen.device), python=platform.python_version(), os=platform.platform(),
        cuda=torch.version.cuda, **(_card() if chosen.device == "cuda" else {}),
    )  # fmt: skip
    rows.add(what="versions", **{name: _version(name) for name in ("torch", "triton", "transformers", "numpy")})
    rows.add(what="tools", **{name: _tool(name, arguments) for name, arguments in _TOOLS.items()})
    rows.add(what="peers", **{package: installed(package) or "not installed" for package in MODULES})
    rows.add(what="backends", **{name: str(backend) for name, backend in tk.backends().items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
