"""A graph of torch.compile is made without values: this file alone asks whether one is being made, and refuses what
cannot be in it.

What differs in a graph follows from `tracing`. A call has the name of its kernel (`call.Named`), for which paths.py
takes the operators of ops.py; and every row takes part, since which ones count is a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["can_look", "refuse_in_graph", "tracing"]


def tracing() -> bool:
    """Returns whether torch.compile is making a graph of what runs."""
    return torch.compiler.is_compiling()


def can_look(values: Tensor) -> bool:
    """Returns whether values may be looked at: a device would be waited for, and a graph has none."""
    return values.device.type == "cpu" and not tracing()


def refuse_in_graph(caller: str, name: str, value: Any) -> None:
    """Refuses an argument that cannot be in a graph.

    Raises:
        NotImplementedError: a graph is being made.
    """
    if tracing():
        got = "a tensor" if isinstance(value, Tensor) else type(value).__name__
        raise NotImplementedError(f"{caller}: {name} must be None under torch.compile; got {got}")
