"""This file makes buffers of logits [C, V], whose rows are padded, and says how many rows a scratch block has: one rule
for every kernel, chunk loop and device.

A row starts at a multiple of 128 bytes, whatever V is:

- on CUDA a ragged leading dimension keeps TMA and 128-bit tensor-core kernels out of all three GEMMs, and wide accesses
  out of the row kernels; 16 bytes would do for those, 128 are a line of L2;
- on a CPU an AMX tile takes 64 bytes of a row at a time, past the last column too, and multiplies what it finds there
  by zero (oneDNN does so where the leading dimension leaves room). Zero times a NaN is NaN.

So the padding is zero from the start, and nobody writes to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_rows", "logits_buffer", "row_bytes"]

_ALIGNMENT = 128  # bytes

# Elements of a scratch block: two of them lie in the L2 caches of a CPU; on a GPU launches must stay few.
_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}


def _stride(vocab: int, itemsize: int) -> int:
    """Returns the number of elements from one row to the next."""
    unit = max(1, _ALIGNMENT // itemsize)
    return -(-vocab // unit) * unit


def row_bytes(vocab: int, dtype: torch.dtype) -> int:
    """Returns what a row of logits holds, padding included."""
    return _stride(vocab, dtype.itemsize) * dtype.itemsize


def logits_buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a buffer [rows, V] for logits that are yet to be written, its padding zero."""
    whole = torch.empty(rows, _stride(vocab, dtype.itemsize), dtype=dtype, device=device)
    if whole.shape[1] > vocab:
        whole[:, vocab:].zero_()
    return whole[:, :vocab]


def block_rows(vocab: int, device: torch.device) -> int:
    """Returns rows of logits that elementwise torch passes take at a time, over scratch blocks of so many rows."""
    return max(1, _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS["cuda"]) // vocab)
