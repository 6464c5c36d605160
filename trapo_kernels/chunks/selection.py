"""This file says which rows of the input take part in a loss: the one place where rows are left out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arguments.graph import tracing
from ..backends.base import RowStats

__all__ = ["Selection"]


@dataclass(frozen=True)
class Selection:
    """Says which rows of the input take part, and in which order: those with a gradient first, then the others.

    `order` None = every row, as it lies, so that chunks are views. Leaving rows out takes their number, for which a GPU
    is waited for once per call. Inside a CUDA graph capture, where nothing may be waited for, and in a graph of
    torch.compile, every row takes part, and `inside` [N] says which ones count.
    """

    total: int
    order: Tensor | None
    size: int
    with_gradient: int
    inside: Tensor | None = None
    leading: int | None = None
    counts: Tensor | None = None  # how many rows are active, and how many of those live; None: not counted

    @classmethod
    def choose(
        cls,
        active: Tensor,
        live: Tensor | None = None,
        drop_others: bool = False,
        leading: Tensor | None = None,
    ) -> Selection:
        """Returns the rows that are `active` [N]; those not `live` [N] have no gradient (None: all have one). Of those
        that have one, the `leading` ones [N] come first."""
        if tracing() or _capturing(active.device):
            inside = active & live if drop_others and live is not None else active
            return cls(active.numel(), None, active.numel(), active.numel(), inside=inside)
        first = active if live is None else active & live
        total, front, counts = active.numel(), None, None
        if leading is None and live is None:
            index = first.nonzero().squeeze(1)
            size = with_gradient = index.numel()
        else:  # in one order by how many of these a row belongs to, with all counts in one copy from the device
            sets = torch.stack([active, first] if leading is None else [active, first, first & leading])
            index = sets.sum(0).argsort(stable=True, descending=True)
            counts = sets.sum(1)
            size, with_gradient, *fronts = counts.tolist()
            size = with_gradient if drop_others else size
            front = fronts[0] if fronts else None
        in_order = with_gradient == total and front in (None, total)
        return cls(total, None if in_order else index[:size], size, with_gradient, leading=front, counts=counts)

    def front(self) -> Selection | None:
        """Returns the leading rows alone; inside a capture all rows; None where none were asked for."""
        if self.inside is not None or self.leading is None:
            return None if self.inside is None else self
        order = None if self.order is None else self.order[: self.leading]
        return Selection(self.total, order, self.leading, self.leading)

    @classmethod
    def every(cls, active: Tensor) -> Selection:
        """Returns all rows, active [N] or not."""
        return cls(active.numel(), None, active.numel(), active.numel())

    def take(self, values: Tensor, rows: slice | None = None) -> Tensor:
        """Returns `values` [N, ...] of the compact rows (all of them, or a slice)."""
        if self.order is None:
            return values if rows is None else values[rows]
        return values.index_select(0, self.order if rows is None else self.order[rows])

    def narrow(self, keep: Tensor) -> tuple[Selection, Selection]:
        """Returns (fewer rows: those of these compact rows to `keep` [n]; the choice among the compact rows)."""
        kept = Selection.choose(keep)
        if kept.inside is not None:
            inside = kept.inside if self.inside is None else kept.inside & self.inside
            return replace(self, inside=inside), Selection(self.size, None, self.size, self.size)
        if kept.order is None:
            return self, kept
        order = kept.order if self.order is None else self.order[kept.order]
        return Selection(self.total, order, kept.size, kept.size), kept

    def counting(self, values: Tensor) -> Tensor:
        """Returns compact `values` [n, ...], zero in the rows that do not count."""
        if self.inside is None:
            return values
        return values.masked_fill(~self.inside.reshape(-1, *[1] * (values.ndim - 1)), 0)

    def counting_stats(self, stats: RowStats) -> RowStats:
        """Returns compact statistics; in the rows that do not count such that a gradient is zero, whatever their logits
        are."""
        if self.inside is None:
            return stats
        top = stats.max.masked_fill(~self.inside, torch.inf)  # of a row with e^(z − ∞) = 0 in every column
        return stats.map(self.counting)._replace(max=top)

    def spread(self, values: Tensor) -> Tensor:
        """Returns compact `values` [n, ...] over all rows [N, ...], zero where none."""
        if self.order is None:
            return self.counting(values)
        return values.new_zeros(self.total, *values.shape[1:]).index_copy(0, self.order, values)

    def spread_all(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Returns constants [n] of one dtype, each spread; together, since on a GPU each operation is a launch."""
        if self.order is None:
            return tuple(map(self.counting, values))
        out = values[0].new_zeros(len(values), self.total)
        return out.index_copy_(1, self.order, torch.stack(values)).unbind()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
