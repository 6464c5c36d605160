"""This file multiplies matrices of 16-bit operands whose results are wide, and keeps fp16 operands in range.

Only CUDA has such products; elsewhere operands are widened, a block of columns at a time (sources.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["WIDE_BYTES", "add_product", "power_of_two", "product", "soft_capped", "target_bytes", "target_logits"]

# Widening 16-bit operands takes a block of this many bytes.
WIDE_BYTES = 2**21

# Gradients of fp16 logits are multiplied so that the largest lies in [2^11, 2^12): what is 2^26 times smaller keeps its
# digits, and fp32 sums of products are far from their end.
_TOP = 2.0**12
_LEAST = 2.0**-100  # so that the factor and its inverse are finite

# Before 2.10 torch gave a wide product, but added none to what is wide (pytorch#167931).
_ADDS_TO_WIDE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
_BLOCK_BYTES = 2**26


def product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Returns the product a b in `dtype`, on CUDA."""
    if out is None:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b, out_dtype=dtype, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: float = 1.0) -> None:
    """Computes total = beta · total + a b in the precision of `total`, on CUDA; nothing is read of it with beta = 0."""
    if _ADDS_TO_WIDE:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
        return
    step = max(1, _BLOCK_BYTES // (total.dtype.itemsize * max(1, total.shape[1])))
    for start in range(0, total.shape[0], step):
        at = slice(start, start + step)
        found = product(a[at], b, total.dtype)
        if beta != 0:
            found.add_(total[at], alpha=beta)
        total[at] = found


def target_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float) -> Tensor:
    """Returns scale · (h · W[y] + b[y]) [n] in fp32, of 16-bit operands, a block of rows at a time. A target outside of
    the vocabulary has any: the row kernels find it, and give NaN."""
    column = targets.clamp(0, weight.shape[0] - 1)
    out = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    step = max(1, target_bytes(hidden.device) // (hidden.shape[1] * (8 + weight.dtype.itemsize)))
    for start in range(0, hidden.shape[0], step):
        at = slice(start, start + step)
        torch.sum(hidden[at].float().mul_(weight.index_select(0, column[at])), 1, out=out[at])
    if bias is not None:
        out += bias[column]
    return out if scale == 1 else out.mul_(scale)


def target_bytes(device: torch.device) -> int:
    """Returns the bytes of a block of `target_logits`: on a GPU launches must stay few."""
    return WIDE_BYTES if device.type == "cpu" else _BLOCK_BYTES


def soft_capped(x: Tensor, cap: float | None) -> Tensor:
    """Returns z of logits x, in their place."""
    return x if cap is None else x.div_(cap).tanh_().mul_(cap)


def power_of_two(largest: Tensor) -> Tensor:
    """Returns the power of two, 0-dim fp32, that takes a number of this size below 2^12; 1 for zero."""
    largest = largest.float().clamp(min=_LEAST)
    # m / (m · 2^e) is 2^-e without an error.
    factor = torch.frexp(largest).mantissa / largest * _TOP
    return torch.where(largest > _LEAST, factor, 1.0)
