"""This file says where a step's time goes."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

PARTS = ("generate", "reward", "logprobs", "update")
BETWEEN = ("evaluate", "save")  # of the time between steps, counted with the step after it
_WHOLE = ("step", "left")  # of seconds_*, no parts


def parts_in(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the seconds of each part that a line of metrics.jsonl, or what `StepTimer.take` gives, has."""
    found = {m[1]: row[key] for key in row if (m := re.fullmatch(r"seconds_(\w+)", key))}
    return {part: seconds for part, seconds in found.items() if part not in _WHOLE and seconds is not None}


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
