"""Numbers that a caller gives: of Python, of numpy, or a symbol inside torch.compile."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

__all__ = ["constant", "filled", "number"]


def number(value: Any) -> Any:
    """The Python number that a value is, or None if it is none: bool is none, numpy's scalars are."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        # A numpy float64 is a float too, and shows as something else.
        return value if torch.compiler.is_compiling() or type(value) in (int, float) else value + 0
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else None


def constant(value: Any) -> Any:
    """The same, but inside torch.compile the value that a symbol has: the graph is for that value alone."""
    found = number(value)
    if found is None or not torch.compiler.is_compiling():
        return found
    # Imported late: it takes half a second.
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return guard_scalar(found)


def filled(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0-dim; a number is filled in on the device, since copying it there would wait for the stream."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)
