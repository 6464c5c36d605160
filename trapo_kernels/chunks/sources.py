"""This file says where chunks of logits come from, and where their gradients go: a linear head, or logits that exist.

fp16 represents nothing below 6e-8, and an entry of dL/dz is a probability times a slope. A loss scale cannot help
there: gradients are made in the forward, and it comes in the backward. So before the gradient of a chunk of fp16 logits
is stored it is multiplied by a power of two that follows from the chunk's largest slope (`magnify`); the products are
summed in fp32, and divided by it there. Gradients of logits that exist are final: slopes come in with the loss scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..backends.base import TargetLogitsVerb, stats_dtype
from ..head import Head
from .buffers import row_bytes
from .products import WIDE_BYTES, add_product, power_of_two, product, soft_capped, target_bytes

if TYPE_CHECKING:
    from .selection import Selection

__all__ = ["LinearSource", "LogitsSource", "Source", "d_hidden_dtype", "finish"]


class Source(Protocol):
    vocab: int
    dtype: torch.dtype  # of the chunks
    device: torch.device
    row_bytes: int  # held at once per row of a chunk
    extra_bytes: int  # and beside that

    def logits(self, rows: slice, out: Tensor) -> Tensor: ...

    def target_logits(self, verb: TargetLogitsVerb, targets: Tensor, cap: float | None) -> Tensor | None:
        """Returns z_y [C] of the chunk whose logits came last, where those are rounded; None: they are not."""
        ...

    def magnify(self, largest: Tensor) -> Tensor:
        """Magnifies chunks in fp16: what the gradient of the next chunk is to be multiplied by; `largest` bounds it."""
        ...

    def put(self, rows: slice, grad: Tensor) -> None: ...

    def gradients(self) -> tuple[Tensor | None, ...]: ...


def d_hidden_dtype(operands: torch.dtype, device: torch.device, wide_chunks: bool = False) -> torch.dtype:
    """Returns the dtype of the gradient of hidden states, before it is scaled: theirs, or wide where that would lose
    what was kept. On a CPU it is wide, as `finish` would make it there: what is rounded before it is scaled is rounded
    twice."""
    wide = wide_chunks or operands == torch.float16 or device.type == "cpu"
    return stats_dtype(operands) if wide else operands


def finish(grad: Tensor, like: Tensor, scale: Tensor | None, give: bool = True) -> Tensor:
    """Returns an accumulated gradient in the dtype of its parameter, scaled in the accumulator's precision. `give`: in
    place where the dtype is right, so that autograd can keep the very tensor as `.grad`."""
    if scale is None:
        return grad.to(like.dtype)
    wide = stats_dtype(grad.dtype)
    if (
        grad.dtype == like.dtype and grad.device.type == "cpu"
    ):  # 16 bits (`round_once`) are widened on the way, not copied
        return grad.mul_(scale) if give else grad * scale
    if grad.dtype != like.dtype and grad.dtype == wide and grad.is_cuda:  # one pass; on a CPU it would be two as well
        return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=like.dtype))
    grad = grad.to(wide)
    return (grad.mul_(scale) if give else grad * scale).to(like.dtype)


class LinearSource:
    """Makes logits of hidden [N, D], weight [V, D], bias [V] or None; gradients of those `wants` names, in that order.

    `wide_chunks`: 16-bit operands give chunks of fp32 logits, whose gradient is not rounded before it has to be.
    `into`: a wide tensor [V, D] to which the gradient of the weight is added, and which then is none of `gradients`.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        selection: Selection,
        *,
        wants: tuple[bool, bool, bool] = (False, False, False),
        wide_chunks: bool = False,
        tolerance: float = 0.0,
        into: Tensor | None = None,
    ) -> None:
        self.hidden, self.weight, self.bias, self.scale, self.selection = hidden, weight, bias, head.scale, selection
        self.operands, self.wide = hidden.dtype, stats_dtype(hidden.dtype)
        self.vocab, self.dtype, self.device = weight.shape[0], self.wide if wide_chunks else hidden.dtype, hidden.device
        self.wide_d_hidden = wide_chunks or self.operands in (torch.float16, self.wide)  # it comes of a wide product
        # Only CUDA has products of 16-bit operands that are wide.
        wide_products = self.dtype == self.wide or wants[1] or wants[2] or (wants[0] and self.wide_d_hidden)
        self.widen = self.operands != self.wide and self.device.type != "cuda" and wide_products
        self.row_bytes = row_bytes(self.vocab, self.dtype)
        self.extra_bytes = target_bytes(hidden.device) if self.operands != self.wide else 0
        self._beta, self.into = 0.0, into  # of the next sum: the first one overwrites
        self.unit: Tensor | None = None  # what the gradient of the current chunk is multiplied by
        self.weight_unit: Tensor | None = None  # and the sums in d_weight, where they are
        self.factor = 1.0  # of all slopes (`round_once`)
        self.tolerance = tolerance  # share of the gradient's mass that may be left out (sparse.py)
        self.left_out: Tensor | None = None  # and the share that was; None: nothing
        self.d_hidden = self.d_weight = self.d_bias = None
        if wants[0]:
            make = hidden.new_empty if selection.order is None else hidden.new_zeros
            dtype = d_hidden_dtype(self.operands, self.device, wide_chunks)
            self.d_hidden = make(hidden.shape, dtype=dtype)
        if wants[1] and into is not None and (self.operands != torch.float16 or self.widen):
            self.d_weight, self._beta = into, 1.0
        elif wants[1]:  # in fp16 the sums of CUDA's products have a factor, which another's have not
            self.d_weight = weight.new_empty(weight.shape, dtype=self.wide)
        if wants[2]:
            self.d_bias = weight.new_zeros(self.vocab, dtype=self.wide)

    def round_once(self, factor: float) -> None:
        """Makes d_weight bf16 from the start, for a loop that writes each of its rows once: it saves 4·V·D bytes and
        two passes over them. `factor`: what gradients would be multiplied by in the end, and slopes are now."""
        if self.d_weight is not None:
            self.d_weight = self.weight.new_empty(self.weight.shape)
        self.factor = factor

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        self._chunk = self.selection.take(self.hidden, rows)
        if self.dtype != self.operands:
            return self._wide_logits(out)
        bias = out if self.bias is None else self.bias
        beta = 0.0 if self.bias is None else self.scale
        return torch.addmm(bias, self._chunk, self.weight.t(), beta=beta, alpha=self.scale, out=out)

    def _wide_logits(self, out: Tensor) -> Tensor:
        if self.widen:
            chunk = self._chunk.to(self.wide)
            for columns in self._blocks(self.weight.shape[1]):
                torch.mm(chunk, self.weight[columns].to(self.wide).t(), out=out[:, columns])
        else:
            product(self._chunk, self.weight.t(), self.wide, out)
        if self.bias is not None:
            out += self.bias
        return out if self.scale == 1 else out.mul_(self.scale)

    def target_logits(self, verb: TargetLogitsVerb, targets: Tensor, cap: float | None) -> Tensor | None:
        return None if self.dtype == self.wide else soft_capped(self._target_logits(verb, targets), cap)

    def _target_logits(self, verb: TargetLogitsVerb, targets: Tensor) -> Tensor:
        return verb(self._chunk, self.weight, self.bias, targets, self.scale)

    def magnify(self, largest: Tensor) -> Tensor:
        self.unit = power_of_two(largest)
        if self.weight_unit is not None:
            self.unit = torch.minimum(self.unit, self.weight_unit)
        return self.unit

    def put(self, rows: slice, grad: Tensor) -> None:
        if self.widen:
            self._put_widened(rows, grad)
        else:
            grad = self._narrow(grad)
            if self.d_hidden is not None:
                self._put_d_hidden(rows, grad)
            self._sum(grad)
        self._beta = 1.0

    def _put_d_hidden(self, rows: slice, grad: Tensor) -> None:
        assert self.d_hidden is not None
        if self.wide_d_hidden and self.operands != self.wide:
            self._store(rows, product(grad, self.weight, self.wide))
        elif self.selection.order is None and self.d_hidden.dtype == self.operands:
            torch.mm(grad, self.weight, out=self.d_hidden[rows])
        else:
            # An out= product is left alone by autocast, as all others here are.
            self._store(rows, torch.mm(grad, self.weight, out=torch.empty_like(self._chunk)))

    def _store(self, rows: slice, found: Tensor) -> None:
        assert self.d_hidden is not None
        if self.unit is not None:
            found = found.div_(self.unit)
        if self.selection.order is None:
            self.d_hidden[rows] = found
        else:
            self.d_hidden.index_copy_(0, self.selection.order[rows], found.to(self.d_hidden.dtype))

    def _sum(self, grad: Tensor) -> None:
        if self.d_weight is not None and self.operands == self.wide:
            self.d_weight.addmm_(grad.t(), self._chunk, beta=self._beta)
        elif self.d_weight is not None:
            if self.unit is not None:
                if self.weight_unit is not None:
                    self.d_weight.mul_(self.unit / self.weight_unit)
                self.weight_unit = self.unit
            add_product(self.d_weight, grad.t(), self._chunk, self._beta)
        if self.d_bias is not None:
            found = grad.sum(0, dtype=self.wide)
            self.d_bias += found if self.unit is None else found.div_(self.unit)

    def _put_widened(self, rows: slice, grad: Tensor) -> None:
        """Computes all products with operands widened, a block of columns at a time."""
        chunk, count = self._chunk.to(self.wide), grad.shape[0]
        if self.unit is not None:
            chunk = chunk / self.unit
        total = None
        if self.d_hidden is not None and self.wide_d_hidden:
            total = chunk.new_zeros(chunk.shape)
        elif self.d_hidden is not None:
            self._put_d_hidden(rows, grad)
        step = count * (grad.dtype != self.wide) + (0 if total is None else self.weight.shape[1])
        for columns in self._blocks(step):
            # A copy, or the columns themselves.
            block = grad[:, columns].to(self.wide)
            if self.d_weight is not None:
                self.d_weight[columns].addmm_(block.t(), chunk, beta=self._beta)
            if self.d_bias is not None:
                found = block.sum(0)
                self.d_bias[columns] += found if self.unit is None else found.div_(self.unit)
            if total is not None:
                total.addmm_(block, self.weight[columns].to(self.wide))
            del block  # before the next one is made
        if total is not None:
            self._store(rows, total)

    def _blocks(self, widened: int) -> Iterator[slice]:
        """Yields blocks of columns, each of which has so many elements to widen."""
        step = max(1, min(self.vocab, WIDE_BYTES // (self.wide.itemsize * max(1, widened))))  # a shard may be empty
        for start in range(0, self.vocab, step):
            yield slice(start, min(start + step, self.vocab))

    def _narrow(self, grad: Tensor) -> Tensor:
        """Returns the gradient of a chunk in the operands' dtype: of wide logits it takes the first half of their
        rows."""
        if grad.dtype == self.operands or grad.numel() == 0:
            return grad.to(self.operands)
        unit = self.magnify(torch.maximum(grad.amax(), -grad.amin())) if self.operands == torch.float16 else None
        narrow = grad.view(self.operands)[:, : self.vocab]
        step = max(1, WIDE_BYTES // (self.wide.itemsize * self.vocab))
        for start in range(0, grad.shape[0], step):
            at = slice(start, start + step)
            narrow[at] = grad[at].clone() if unit is None else grad[at] * unit
        return narrow

    def begin_sum(self) -> bool:
        """Returns whether d_weight holds a sum that the next one is added to; from now on it does."""
        before, self._beta = self.has_sum, 1.0
        return before

    @property
    def has_sum(self) -> bool:
        return self._beta != 0

    def gradients(self) -> tuple[Tensor | None, ...]:
        if self.d_weight is not None and self._beta == 0:
            self.d_weight.zero_()
        if self.d_weight is not None and self.weight_unit is not None:
            self.d_weight.div_(self.weight_unit)
        if self.into is None or self.d_weight is None:
            return self.d_hidden, self.d_weight, self.d_bias
        if self.d_weight is not self.into:
            self.into += self.d_weight
        return self.d_hidden, None, self.d_bias


class LogitsSource:
    """Takes logits that exist already [N, V]: no GEMM; chunks are in the statistics' dtype, the gradient in the
    logits'."""

    extra_bytes = 0

    def __init__(self, logits: Tensor, head: Head, selection: Selection, wanted: bool = False) -> None:
        self.given, self.scale, self.selection = logits, head.scale, selection
        self.vocab, self.dtype, self.device = logits.shape[1], stats_dtype(logits.dtype), logits.device
        # The chunk, and a copy of it on the way in and out where rows are picked or converted.
        self.row_bytes = row_bytes(self.vocab, self.dtype) + self.vocab * logits.dtype.itemsize
        self.grad = torch.zeros_like(logits) if wanted else None

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        return out.copy_(self.selection.take(self.given, rows)).mul_(self.scale)

    def target_logits(self, verb: TargetLogitsVerb, targets: Tensor, cap: float | None) -> Tensor | None:
        return None

    def magnify(self, largest: Tensor) -> Tensor:
        raise AssertionError("chunks are wide")

    def put(self, rows: slice, grad: Tensor) -> None:
        assert self.grad is not None
        if self.selection.order is None:
            self.grad[rows] = grad
        else:
            self.grad.index_copy_(0, self.selection.order[rows], grad.to(self.grad.dtype))

    def gradients(self) -> tuple[Tensor | None, ...]:
        return (self.grad,)
