"""The output head stands here as data: what turns hidden states into the logits that the softmax sees."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .arguments.scalars import from_tensor, number, shown

__all__ = ["Head"]


@dataclass(frozen=True)
class Head:
    """Turns hidden states into z = softcap · tanh(logit_scale · (h Wᵀ + b) / softcap) / temperature; without softcap
    the tanh is left out.

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
            found = number(from_tensor(value))
            # Not math.isfinite: under torch.compile with dynamic shapes a number is a symbol.
            if found is None or not 0 < found < math.inf:
                accepted = "a finite number above 0" + (" or None" if name == "softcap" else "")
                raise ValueError(f"{name} must be {accepted}; got {shown(value)}")
            object.__setattr__(self, name, found)
        index = number(self.ignore_index)
        if not isinstance(index, int):
            raise TypeError(f"ignore_index must be an int; got {shown(self.ignore_index)}")
        if not -(2**63) <= index < 2**63:
            raise ValueError(f"ignore_index must be an int of 64 bits; got {shown(self.ignore_index)}")
        object.__setattr__(self, "ignore_index", index)

    @property
    def scale(self) -> float:
        """Returns dx/d(h Wᵀ + b)."""
        return self.logit_scale / self.temperature

    @property
    def cap(self) -> float | None:
        """Returns the soft-cap of z, temperature included."""
        return None if self.softcap is None else self.softcap / self.temperature

    @property
    def options(self) -> tuple[float, float | None, float]:
        """Returns (temperature, softcap, logit_scale), as an operator takes them."""
        return self.temperature, self.softcap, self.logit_scale
