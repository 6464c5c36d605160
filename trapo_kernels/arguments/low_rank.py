"""A low-rank adapter of the head comes as `lora=(A [r, D], B [V, r], scale)`: W + scale · B A in the place of W."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .scalars import constant, shown
from .validate import check_linear, under_autocast

__all__ = ["check_lora", "side_by_side"]


def check_lora(caller: str, lora: Any, hidden: Any, weight: Any, **others: Any) -> tuple[Tensor, Tensor]:
    """Returns (scale · A [r, D], B [V, r]).

    Raises:
        TypeError, ValueError: it is no adapter of this head, or goes with one of the `others`, which is not None.
    """
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{caller}: lora must be None where {name} is given; got both")
    if not isinstance(lora, (tuple, list)) or len(lora) != 3 or not all(isinstance(t, Tensor) for t in lora[:2]):
        raise TypeError(f"{caller}: lora must be (A [r, D], B [V, r], scale); got {shown(lora)}")
    a, b, scale = lora
    factor = constant(scale)
    if factor is None or not abs(factor) < float("inf"):
        raise ValueError(f"{caller}: lora's scale must be a finite number; got {shown(scale)}")
    hidden, weight = under_autocast(hidden, weight)
    check_linear(caller, hidden, weight, None)
    vocab, width = weight.shape
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] < 1 or a.shape != (b.shape[1], width) or b.shape[0] != vocab:
        got = f"{list(a.shape)} and {list(b.shape)}"
        raise ValueError(f"{caller}: lora must have A [r, {width}] and B [{vocab}, r] with r >= 1; got {got}")
    for name, value in (("A", a), ("B", b)):
        wider = value.dtype == torch.float32 and hidden.dtype in (torch.float16, torch.bfloat16)
        if value.dtype != hidden.dtype and not wider:
            got = f"{value.dtype} with {hidden.dtype}"
            raise TypeError(f"{caller}: lora's {name} must have the dtype of hidden, or 32 bits beside 16; got {got}")
        if value.device != hidden.device:
            raise ValueError(f"{caller}: lora's {name} must be on the device of hidden, {hidden.device}")
    return a * factor, b


def side_by_side(hidden: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ([h, h Aᵀ], [W, B]), a head without an adapter that has the same logits and is a copy of the other."""
    hidden, weight = under_autocast(hidden, weight)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        side = hidden.to(wide) @ a.to(wide).t()
    # Of 32 bits where the adapter is, so that its gradient is not rounded.
    dtype = torch.promote_types(weight.dtype, b.dtype)
    return torch.cat([hidden, side.to(hidden.dtype)], -1), torch.cat([weight.to(dtype), b.to(dtype)], 1)
