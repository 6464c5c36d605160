"""The C++ backend for CPUs has row kernels, the chunk loop by panels, gradients that leave out what hardly counts."""

from ..base import Passes, RowKernel
from . import panels, rows
from .rows import missing

__all__ = ["KERNEL", "missing"]

KERNEL = RowKernel(
    rows.stats,
    rows.grad_,
    fused_=rows.fused_,
    passes=Passes(panels.takes, panels.forward, panels.backward, rounds_once=True),  # GEMMs and softmax interleaved
)
