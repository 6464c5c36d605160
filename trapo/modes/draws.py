"""This file draws how much of its trace a prompt is given, where a mode leaves that to chance."""

from __future__ import annotations

import dataclasses
import random
from typing import Any


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Draws a ratio between two."""

    low: float
    high: float

    def __call__(self, prompt: Any, rng: random.Random) -> float:
        return rng.uniform(self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Binomial:
    """Draws how many of a trace's equal pieces are given, each with probability p."""

    pieces: int
    p: float

    def __call__(self, prompt: Any, rng: random.Random) -> float:
        return sum(rng.random() < self.p for _ in range(self.pieces)) / self.pieces
