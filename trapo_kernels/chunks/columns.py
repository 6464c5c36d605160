"""The recomputing backward can go over blocks of the vocabulary: each row of d_weight is written once.

    for columns in blocks:
        x = scale · (hidden W[columns]ᵀ + b[columns])    GEMM, into one reused buffer                        [n, B]
        row kernel: x becomes scale · dL/dx in place     with the statistics that the forward kept
        d_W[columns] = xᵀ hidden                         GEMM, written once, in W's own dtype                [B, D]
        d_hidden += x W[columns]                         GEMM, accumulated in fp32 (fp64 for fp64)           [n, D]

For losses whose gradients cannot be made in the forward: what is differentiable is the logprobs, and the slopes come
later (sequence-level objectives, a second backward). FLOPs: 6·n·D·V, as over chunks of rows. What differs is the
accumulator that goes through memory once per block:

    chunks of C rows:     d_W in fp32, 8·V·D bytes each, n / C times, and 4·V·D bytes held beside d_W itself
    blocks of B columns:  d_hidden in fp32, 8·n·D bytes each, V / B times, and 4·n·D bytes held

With one budget for the buffer (C·V = n·B) blocks of columns move n / V times the bytes, so `pays` compares those.

A loss on a support (support/rows.py) has K columns a row that are written over what the kernel leaves there.

A target outside the block must not be written: every row kernel puts its gradient at one column, so the buffer ends in
columns nobody reads, and that is where those targets point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.base import RowKernel, RowStats, stats_dtype
from ..head import Head
from .budget import get_budget_mb
from .products import WIDE_BYTES, add_product
from .sources import d_hidden_dtype

__all__ = ["Columns", "Recompute", "block_columns", "capped_slope", "pays"]

# Columns at the end of the buffer that are nobody's; as many as keep its rows aligned.
_SPARE = 64


@dataclass(frozen=True)
class Columns:
    """Says where the ids of a support are in columns `start` to `start + size` of a row: `index` [n, K], where
    `here`."""

    index: Tensor
    here: Tensor

    @classmethod
    def of(cls, ids: Tensor, start: int, size: int) -> Columns:
        here = (ids >= start) & (ids < start + size)
        return cls((ids - start).masked_fill(~here, 0), here)

    @classmethod
    def in_shard(cls, ids: Tensor, kernel: RowKernel, vocab: int) -> Columns:
        """Returns which ids are among the columns that a kernel holds."""
        shard = kernel.shard
        return cls.of(ids, 0, vocab) if shard is None else cls.of(ids, shard.offset, shard.size)

    def at(self, rows: slice) -> Columns:
        return Columns(self.index[rows], self.here[rows])

    def take(self, x: Tensor) -> Tensor:
        """Returns the logits there [n, K], 0 where not here."""
        if x.shape[1] == 0:
            return x.new_zeros(self.index.shape)
        return x.gather(1, self.index).masked_fill(~self.here, 0)

    def put_(self, x: Tensor, values: Tensor) -> None:
        """Writes `values` [n, K] there, and nothing anywhere else."""
        if x.shape[1] == 0 or self.index.shape[1] == 0:
            return
        # What is not here writes once more what the first one that is writes; a row without any its own first column.
        first = self.here.to(torch.uint8).argmax(1, keepdim=True)
        some = self.here.gather(1, first)
        index = torch.where(self.here, self.index, self.index.gather(1, first))
        alike = torch.where(some, values.gather(1, first).to(x.dtype), x[:, :1])
        x.scatter_(1, index, torch.where(self.here, values.to(x.dtype), alike))


def capped_slope(z: Tensor, cap: float | None) -> Tensor | float:
    """Returns dz/dx at z = cap · tanh(x / cap)."""
    return 1.0 if cap is None else 1 - (z / cap).square()


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
    `support`: ids [n, K] and the derivatives of the loss by their logits [n, K]; the others are then of the rest.
    `weight_dtype`: of d_weight, where the parameter has more digits than the weight that is multiplied here."""

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
    weight_dtype: torch.dtype | None = None

    def gradients(self, wants: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns (d_hidden [n, D], d_weight [V, D], d_bias [V]) of those `wants` names; the last is in fp32."""
        hidden, weight, wide = self.hidden, self.weight, stats_dtype(self.hidden.dtype)
        d_hidden = torch.zeros_like(hidden, dtype=wide) if wants[0] else None
        d_weight = self._new_weight_gradient() if wants[1] else None
        d_bias = weight.new_empty(weight.shape[0], dtype=wide) if wants[2] else None
        for columns, dx in self._blocks():
            if d_weight is not None and d_weight.dtype == dx.dtype:
                torch.mm(dx.t(), hidden, out=d_weight[columns])
            elif d_weight is not None:
                _add_product(d_weight[columns], dx.t(), hidden)
            if d_bias is not None:
                _column_sums(dx, d_bias[columns])
            if d_hidden is not None:
                _add_product(d_hidden, dx, weight[columns])
        if d_hidden is not None:
            d_hidden = d_hidden.to(d_hidden_dtype(hidden.dtype, hidden.device))
        return d_hidden, d_weight, d_bias

    def _new_weight_gradient(self) -> Tensor:
        """Returns what is written over where it has the products' dtype, and what they are added to where it is
        wider."""
        if self.weight_dtype in (None, self.weight.dtype):
            return torch.empty_like(self.weight, memory_format=torch.contiguous_format)
        return self.weight.new_zeros(self.weight.shape, dtype=self.weight_dtype)

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
