"""A head with a low-rank adapter has logits h Wᵀ + b + u Bᵀ, u = h Aᵀ, for A [r, D] and B [V, r], and a frozen W has no
gradient: two GEMMs of the head's size in place of three, and products that r makes small.

    chunk       x = scale · (hidden[rows] Wᵀ + b)          GEMM 1            [C, V]
                x += scale · u[rows] Bᵀ                    2·C·r·V FLOPs
    gradient    d_hidden[rows] = dx W                      GEMM 2
                d_u[rows] = dx B,  d_B += dxᵀ u[rows]      4·C·r·V FLOPs, wide
    at the end  d_A = d_uᵀ hidden,  d_hidden += d_u A      4·N·r·D FLOPs, wide

u is computed wide and rounded to the operands' dtype for its products with what has the vocabulary's size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.base import TargetLogitsVerb
from .products import product
from .sources import LinearSource

__all__ = ["LowRankSource"]


class LowRankSource(LinearSource):
    """Makes logits of a head with an adapter `a` [r, D], `b` [V, r]; gradients of hidden, weight, bias, a and b."""

    def __init__(self, a: Tensor, b: Tensor, *args: Any, wants: tuple[bool, ...], **options: Any) -> None:
        super().__init__(*args, wants=(wants[0], wants[1], wants[2]), **options)
        self.a, self.b = a.to(self.wide), b.to(self.operands)
        side = self.selection.take(self.hidden).to(self.wide)
        side = torch.mm(side, self.a.t(), out=side.new_empty(side.shape[0], a.shape[0]))
        self.side, self.wants_a = side.to(self.operands), wants[3]
        # Of what has a gradient in u: hidden and a.
        self.d_side = torch.zeros_like(self.side, dtype=self.wide) if wants[0] or wants[3] else None
        self.d_b = torch.zeros_like(self.b, dtype=self.wide) if wants[4] else None

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        self._side_chunk = self.side[rows]
        return super().logits(rows, out).addmm_(self._side_chunk, self.b.t(), alpha=self.scale)

    def _target_logits(self, verb: TargetLogitsVerb, targets: Tensor) -> Tensor:
        return super()._target_logits(verb, targets) + verb(self._side_chunk, self.b, None, targets, self.scale)

    def put(self, rows: slice, grad: Tensor) -> None:
        d_side = self._put_side(grad)
        if d_side is not None and self.d_side is not None:
            self.d_side[rows] = d_side if self.unit is None else d_side.div_(self.unit)
        super().put(rows, grad)

    def _put_side(self, grad: Tensor) -> Tensor | None:
        """Adds to d_b, and returns the gradient of the chunk's u [C, r], multiplied as `grad` is."""
        chunk = self._side_chunk.to(self.wide)
        chunk = chunk if self.unit is None else chunk / self.unit
        total = None if self.d_side is None else chunk.new_zeros(chunk.shape)
        if self.operands != self.wide and self.device.type == "cuda":
            if self.d_b is not None:
                found = product(grad.t(), self._side_chunk, self.wide)
                self.d_b += found if self.unit is None else found.div_(self.unit)
            return total if total is None else product(grad, self.b, self.wide)
        for columns in self._blocks(grad.shape[0] if self.operands != self.wide else 0):
            block = grad[:, columns].to(self.wide)
            if self.d_b is not None:
                self.d_b[columns].addmm_(block.t(), chunk)
            if total is not None:
                total.addmm_(block, self.b[columns].to(self.wide))
        return total

    def gradients(self) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = super().gradients()
        d_a = None
        if self.d_side is not None:
            # Rows without gradient come last; zero times what is not finite there would be NaN.
            at = slice(0, self.selection.with_gradient)
            d_side = self.d_side[at]
            if self.wants_a:
                rows = self.selection.take(self.hidden, at).to(self.wide)
                d_a = torch.mm(d_side.t(), rows, out=torch.empty_like(self.a))
            if d_hidden is not None:
                found = torch.mm(d_side, self.a, out=d_side.new_empty(d_side.shape[0], self.a.shape[1]))
                self._add_to_rows(d_hidden, at, found)
        return d_hidden, d_weight, d_bias, d_a, self.d_b

    def _add_to_rows(self, d_hidden: Tensor, at: slice, found: Tensor) -> None:
        """Adds to the gradient of hidden states what these compact rows have beside it."""
        if self.selection.order is None:
            d_hidden.copy_(found.add_(d_hidden))
        else:
            order = self.selection.order[at]
            d_hidden.index_copy_(0, order, found.add_(d_hidden.index_select(0, order)).to(d_hidden.dtype))
