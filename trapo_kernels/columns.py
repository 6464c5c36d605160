"""The recomputing backward can go over blocks of the vocabulary: each row of d_weight is written once.

    for columns in blocks:
        x = scale · (hidden W[columns]ᵀ + b[columns])    GEMM, into one reused buffer                        [n, B]
        row kernel: x becomes scale · dL/dx in place     with the statistics that the forward kept
        d_W[columns] = xᵀ hidden                         GEMM, written once, in W's dtype                    [B, D]
        d_hidden += x W[columns]                         GEMM, accumulated in fp32 (fp64 for fp64)           [n, D]

For losses whose gradients cannot be made in the forward: what is differentiable is the logprobs, and the slopes come
later (sequence-level objectives, a second backward). FLOPs: 6·n·D·V, as over chunks of rows. What differs is the
accumulator that goes through memory once per block:

    chunks of C rows:     d_W in fp32, 8·V·D bytes each, n / C times, and 4·V·D bytes held beside d_W itself
    blocks of B columns:  d_hidden in fp32, 8·n·D bytes each, V / B times, and 4·n·D bytes held

With one budget for the buffer (C·V = n·B) blocks of columns move n / V times the bytes, so `pays` compares those.

A loss on a support (support_rows.py) has K columns a row that are written over what the kernel leaves there.

A target outside the block must not be written: every row kernel puts its gradient at one column, so the buffer ends in
columns nobody reads, and that is where those targets point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends.base import RowKernel, RowStats, stats_dtype
from .budget import get_budget_mb
from .head import Head
from .products import WIDE_BYTES, add_product
from .support_rows import Columns, capped_slope

__all__ = ["Recompute", "block_columns", "pays"]

# Columns at the end of the buffer that are nobody's; as many as keep its rows aligned.
_SPARE = 64


def block_columns(rows: int, vocab: int, itemsize: int, device_type: str) -> int:
    """Returns the columns of a block, so that rows · (columns + spare) · itemsize keeps to the budget; blocks of equal
    size."""
    room = int(get_budget_mb(device_type) * 2**20) - (WIDE_BYTES if device_type == "cpu" else 0)
    most = room // max(1, rows * itemsize) - _SPARE
    most = max(_SPARE, most - most % _SPARE)
    even = math.ceil(vocab / math.ceil(vocab / most))
    return min(most, math.ceil(even / _SPARE) * _SPARE)


def pays(rows: int, vocab: int, itemsize: int, device_type: str) -> bool:
    """Returns whether blocks of columns fit the budget, and move fewer bytes of accumulators than chunks of rows."""
    room = get_budget_mb(device_type) * 2**20
    return 0 < rows <= vocab and rows * 2 * _SPARE * itemsize <= room


@dataclass(frozen=True)
class Recompute:
    """Is a backward pass: compact hidden [n, D], weight [V, D], bias [V] or None; everything per row is compact [n].
    `support`: ids [n, K] and the derivatives of the loss by their logits [n, K]; the others are then of the rest."""

    kernel: RowKernel
    head: Head
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    stats: RowStats
    g_lp: Tensor
    g_entropy: Tensor | None
    support: tuple[Tensor, Tensor] | None = None

    def gradients(self, wants: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns (d_hidden [n, D], d_weight [V, D], d_bias [V]) of those `wants` names; the last is in fp32."""
        hidden, weight, wide = self.hidden, self.weight, stats_dtype(self.hidden.dtype)
        d_hidden = torch.zeros_like(hidden, dtype=wide) if wants[0] else None
        d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wants[1] else None
        d_bias = weight.new_empty(weight.shape[0], dtype=wide) if wants[2] else None
        for columns, dx in self._blocks():
            if d_weight is not None:
                torch.mm(dx.t(), hidden, out=d_weight[columns])
            if d_bias is not None:
                _column_sums(dx, d_bias[columns])
            if d_hidden is not None:
                _add_product(d_hidden, dx, weight[columns])
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields (columns, the gradient of their logits [n, B])."""
        rows, vocab = self.hidden.shape[0], self.weight.shape[0]
        step = block_columns(rows, vocab, self.hidden.dtype.itemsize, self.hidden.device.type)
        buffer = self.hidden.new_zeros(rows, step + _SPARE)
        g_lp, scale = self.g_lp * self.head.scale, self.head.scale
        g_entropy = None if self.g_entropy is None else self.g_entropy * scale
        for start in range(0, vocab, step):
            size = min(step, vocab - start)
            columns, x = slice(start, start + size), buffer[:, :size]
            bias = x if self.bias is None else self.bias[columns]
            beta = 0.0 if self.bias is None else scale
            torch.addmm(bias, self.hidden, self.weight[columns].t(), beta=beta, alpha=scale, out=x)
            local = self.targets - start
            local = torch.where((local >= 0) & (local < size), local, size)
            taken = self._of_support(x, start)
            self.kernel.grad_(buffer[:, : size + _SPARE], local, self.stats, g_lp, g_entropy, self.head.cap)
            if taken is not None:
                taken[0].put_(x, taken[1])
            # Products on a CPU may read past their operand (buffers.py), where by now there can be an infinity.
            buffer[:, size : size + _SPARE].zero_()
            yield columns, x

    def _of_support(self, x: Tensor, start: int) -> tuple[Columns, Tensor] | None:
        """Returns (where the support's ids are in a block of logits x, the gradient there [n, K])."""
        if self.support is None:
            return None
        ids, slopes = self.support
        columns, cap = Columns.of(ids, start, x.shape[1]), self.head.cap
        if cap is not None:
            own = columns.take(x).to(slopes.dtype)
            slopes = slopes * capped_slope(cap * torch.tanh(own / cap), cap)
        return columns, slopes * self.head.scale


def _column_sums(a: Tensor, out: Tensor) -> None:
    """Computes out = a summed over its rows, in the precision of `out`; a CPU would widen the whole of `a` first."""
    step = a.shape[1]
    if a.dtype != out.dtype and a.device.type == "cpu":
        step = max(1, WIDE_BYTES // (out.dtype.itemsize * a.shape[0]))
    for start in range(0, a.shape[1], step):
        at = slice(start, start + step)
        torch.sum(a[:, at], 0, dtype=out.dtype, out=out[at])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Computes total += a b, summed in the precision of `total`: products rounded before the sum would bias
    training."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        add_product(total, a, b)
    else:
        step = max(1, WIDE_BYTES // (total.dtype.itemsize * (a.shape[0] + b.shape[1])))
        for start in range(0, a.shape[1], step):
            at = slice(start, start + step)
            total.addmm_(a[:, at].to(total.dtype), b[at].to(total.dtype))
