"""This file says where a step's time goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARTS = ("generate", "reward", "logprobs", "update")


class StepTimer:
    """Counts seconds by part of a step. Parts may nest: time counts for the innermost one."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._open: list[str] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._since = time.monotonic()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time spent inside as `name`."""
        self._close_stretch()
        self._open.append(name)
        try:
            yield
        finally:
            self._close_stretch()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Returns `seconds_<part>` of everything since the last call; those of PARTS are always there."""
        taken = {f"seconds_{name}": self._seconds[name] for name in (*PARTS, *self._seconds)}
        self._seconds.clear()
        return taken

    def _close_stretch(self) -> None:
        if self.device.type == "cuda":  # kernels run later than they are launched
            torch.cuda.synchronize(self.device)
        now = time.monotonic()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now
