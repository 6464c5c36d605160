"""The output head, as data: what turns hidden states into the logits that the softmax sees."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Head"]


@dataclass(frozen=True)
class Head:
    """z = softcap · tanh(logit_scale · (h Wᵀ + b) / softcap) / temperature; without softcap the tanh is left out.

    A row kernel gets x = scale · (h Wᵀ + b), which the GEMM scales for free, and applies z = cap · tanh(x / cap).
    """

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    ignore_index: int = -100

    def __post_init__(self) -> None:
        for name in ("temperature", "softcap", "logit_scale"):
            value = getattr(self, name)
            if value is None and name == "softcap":
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            # Not math.isfinite: under torch.compile with dynamic shapes a number is a symbol.
            if not (number and 0 < value < math.inf):
                accepted = "a finite number above 0" + (" or None" if name == "softcap" else "")
                raise ValueError(f"{name} must be {accepted}; got {value!r}")
        if not isinstance(self.ignore_index, int) or isinstance(self.ignore_index, bool):
            raise TypeError(f"ignore_index must be an int; got {self.ignore_index!r}")

    @property
    def scale(self) -> float:
        """dx/d(h Wᵀ + b)."""
        return self.logit_scale / self.temperature

    @property
    def cap(self) -> float | None:
        """The soft-cap of z, temperature included."""
        return None if self.softcap is None else self.softcap / self.temperature

    @property
    def options(self) -> tuple[float, float | None, float]:
        """(temperature, softcap, logit_scale), as an operator takes them."""
        return self.temperature, self.softcap, self.logit_scale
