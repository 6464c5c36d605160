"""Memory that nobody wrote is NaN, and nothing but finite numbers may lie beside a row that a matrix product reads.

`with hostile_memory():` in a test; `pytest -p hostile_memory` (with tests/ on PYTHONPATH) runs every test in it.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def fresh_memory_is_nan():
    """Every buffer that an operator or a C++ extension gets from ATen is full of NaN (integers: of their maximum)."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


class ReadsPastRows(TorchDispatchMode):
    """Raises at a matrix product that has an operand with anything but finite numbers between its rows: a product of
    bf16 on AMX multiplies it by zero."""

    def __init__(self):
        super().__init__()
        self.padded = 0  # operands with something between their rows

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            for operand in args[-2:]:
                self.check(operand)
        return func(*args, **(kwargs or {}))

    def check(self, operand):
        rows = operand if operand.stride(1) == 1 else operand.t()
        beside = rows.stride(0) - rows.shape[1]
        if rows.stride(1) != 1 or beside <= 0 or rows.numel() == 0:
            return
        self.padded += 1
        # The padding of the last row too: a view of a smaller chunk ends before the buffer does.
        offset = rows.storage_offset() + rows.shape[1]
        read = min(beside, 64 // rows.element_size())  # a row of a tile
        storage = rows.untyped_storage().nbytes() // rows.element_size()
        count = rows.shape[0] if offset + (rows.shape[0] - 1) * rows.stride(0) + read <= storage else rows.shape[0] - 1
        between = rows.detach().as_strided((count, read), (rows.stride(0), 1), offset)
        assert between.isfinite().all(), f"{rows.shape[1]} columns are followed by {between.flatten()[:4].tolist()}"


@contextmanager
def hostile_memory():
    with fresh_memory_is_nan(), ReadsPastRows() as watched:
        yield watched


@pytest.fixture(autouse=True)
def _every_test_on_hostile_memory():
    with hostile_memory():
        yield
