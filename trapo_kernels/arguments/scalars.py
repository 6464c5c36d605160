"""This file takes numbers that a caller gives: of Python, of numpy, or a symbol inside torch.compile. It also says how
messages show a value."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from .graph import tracing

__all__ = ["constant", "filled", "from_tensor", "number", "shown"]


def number(value: Any) -> Any:
    """Returns the Python number that a value is, or None if it is none: bool is none, numpy's scalars are."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        # A numpy float64 is a float too, and shows as something else.
        return value if tracing() or type(value) in (int, float) else float(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else None


def constant(value: Any) -> Any:
    """Returns what `number` does, but inside torch.compile the value that a symbol has: the graph is for that value
    alone."""
    found = number(value)
    if found is None or not tracing():
        return found
    # Imported late: it takes half a second.
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return guard_scalar(found)


def filled(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a 0-dim tensor; a number is filled in on the device, since copying it there would wait for the stream."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def from_tensor(value: Any) -> Any:
    """Returns the number in a 0-dim tensor, for which a device is waited for; anything else as it is."""
    if not isinstance(value, Tensor) or value.ndim != 0 or value.dtype == torch.bool or value.is_complex():
        return value
    if tracing():
        raise TypeError("head options must be numbers under torch.compile; got a tensor")
    return value.item()


def shown(value: Any) -> str:
    """Returns a value as an error message shows it: one line, not long."""
    if isinstance(value, Tensor) and value.ndim != 0:
        return f"a tensor of shape {list(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."
