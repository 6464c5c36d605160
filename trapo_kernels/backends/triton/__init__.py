"""The Triton backend has row kernels, and kernels that go from hidden states to statistics without writing a logit."""

from ..base import RowKernel
from . import rows, tiles
from .rows import interpreted, missing

__all__ = ["KERNEL", "interpreted", "missing"]

KERNEL = RowKernel(
    rows.stats,
    rows.grad_,
    fused_=rows.fused_,
    fused_float64=False,  # Triton passes an objective's numbers in fp32
    target_logits=rows.target_logits,
    linear_stats=tiles.linear_stats,
    by_columns=True,
)
