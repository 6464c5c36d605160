"""This file says what the C++ operators are told of their operands, and where logits wait between them."""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BLOCK", "FLOATS", "PANEL", "Keep", "products_of"]

# As in panels.h: rows of the weight in a panel, tokens in a block; and in products.h.
PANEL, BLOCK = 256, 64
FLOATS, TILES = 0, 2


def products_of(dtype: torch.dtype) -> int | None:
    """Returns the products of products.h for operands of this dtype on this CPU; None: this loop leaves them to
    stream.py."""
    return _best_products() if dtype == torch.bfloat16 else FLOATS


@cache
def _best_products() -> int | None:
    found = int(torch.ops.trapo_kernels_cpu.best_products())
    return found if found != TILES or trusts_tiles() else None


def trusts_tiles() -> bool:
    """Returns whether AMX may be used: no CPU that has it has run this loop yet, so it is not unless asked for."""
    return os.environ.get("TRAPO_KERNELS_AMX", "0") == "1"


class Keep(NamedTuple):
    """Says where the logits of a chunk wait for the gradient: in d_weight, and what has no room there in a buffer
    [panels, blocks, 256, 64]. `references`: what 16-bit ones are relative to, once they are there."""

    in_d_weight: bool
    buffer: Tensor | None
    references: Tensor | None = None
