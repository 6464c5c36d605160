"""Rows of a stage: appended to a file one by one, so that what was found is there whatever happens next; and clocks."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["Rows", "one_line", "options", "peak_bytes", "read", "seconds_of", "settle"]

# Written between two runs, so that neither finds the other's data in L2.
_FLUSHED = 2**28
_flush: dict[str, torch.Tensor] = {}


class Rows:
    """Appends rows to a file; each is on disk when `add` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def add(self, **fields: Any) -> None:
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        print("ROW", json.dumps(fields), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file; a last line that was torn is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def options(doc: str | None, arguments: list[str] | None = None, **more: dict[str, Any]) -> argparse.Namespace:
    """Returns the options of a stage: --device, --rows, and `more` of its own."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=Path, required=True, help="file to which rows are appended")
    for name, keywords in more.items():
        parser.add_argument("--" + name.replace("_", "-"), **keywords)
    return parser.parse_args(arguments)


def one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


def settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], Any], device: str, budget: float = 0.4, least: int = 3) -> float:
    """Returns the median of as many runs as fit into `budget` seconds, by CUDA events with a cold L2, or by a CPU's
    clock."""
    step()
    settle(device)
    start = time.perf_counter()
    step()
    settle(device)
    count = max(least, min(200, int(budget / max(time.perf_counter() - start, 1e-9))))
    return statistics.median(_on_gpu(step, count) if device == "cuda" else _on_cpu(step, count))


def _on_cpu(step: Callable[[], Any], count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


def _on_gpu(step: Callable[[], Any], count: int) -> list[float]:
    if "cuda" not in _flush:
        _flush["cuda"] = torch.empty(_FLUSHED, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:
        _flush["cuda"].zero_()
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def peak_bytes(step: Callable[[], Any], device: str) -> int | None:
    """Returns the bytes allocated at the peak beyond what was there before; None on a CPU, whose allocator does not
    count."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
