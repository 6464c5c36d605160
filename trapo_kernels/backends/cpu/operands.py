"""This file says what the C++ operators are told of their operands, and where logits wait between them."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BLOCK", "FLOATS", "PANEL", "Keep", "products_of"]

# As in panels.h: rows of the weight in a panel, tokens in a block; and in products.h.
PANEL, BLOCK = 256, 64
FLOATS = 0


def products_of(dtype: torch.dtype) -> int:
    """Returns the products of products.h for operands of this dtype on this CPU."""
    return _best_products() if dtype == torch.bfloat16 else FLOATS


@cache
def _best_products() -> int:
    return int(torch.ops.trapo_kernels_cpu.best_products())


class Keep(NamedTuple):
    """Says where the logits of a chunk wait for the gradient: in d_weight, and what has no room there in a buffer
    [panels, blocks, 256, 64]. `references`: what 16-bit ones are relative to, once they are there."""

    in_d_weight: bool
    buffer: Tensor | None
    references: Tensor | None = None
