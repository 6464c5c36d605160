"""This file is for heads whose vocabulary is sharded over the ranks of a group (tensor parallel): rank r holds the rows
from offset_r to offset_r + V_r of the weight, of any sizes; hidden states and targets (ids in the whole vocabulary) are
the same on all.

    per chunk, forward     all-reduce max z                              C numbers, maximum
                           all-reduce Σ e^(z−m), Σ e^(z−m)(z−m), z_y     4 C numbers, sum
                           and how many shards have the maximum
                           of 16-bit heads, all-reduce z_y in fp32       C numbers, sum
    per call               all-gather shard sizes and what must agree    24 integers (agreement.py), and once more in
                           the backward of log-probabilities
                           all-reduce d_hidden                           N·D numbers, where hidden states are trained

Nothing of the size of the vocabulary is sent; the gradient of a shard stays with its rank. A chunk of rows has the same
size everywhere, by the largest shard.

The stream knows next to nothing of this: a row kernel is wrapped in another, whose `stats` merges the states of the
shards, which are states of disjoint columns, and whose `grad_` is told the statistics of the whole row.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.base import RowKernel, RowState, RowStats, TargetLogitsVerb, stats_dtype
from ..chunks.buffers import row_bytes
from ..chunks.sources import LinearSource

__all__ = ["Shard", "ShardedSource", "gather", "local_parts", "shard_of", "sharded"]

_FLOOR = -1e4  # e^-1e4 is 0 in fp64 too; 0 · −∞ is not


@dataclass(frozen=True)
class Shard:
    """Describes this rank's part of a vocabulary of `vocab`: `size` rows from `offset` on; `largest` is the largest
    part."""

    group: Any
    offset: int
    size: int
    vocab: int
    largest: int
    sizes: tuple[int, ...]

    def columns(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (the column of each target here [n], whether it is here at all [n]); somewhere in range where it is
        not."""
        here = (targets >= self.offset) & (targets < self.offset + self.size)
        return (targets - self.offset).clamp(0, max(self.size - 1, 0)), here


def shard_of(group: Any, sizes: list[int]) -> Shard:
    """Returns this rank's part, of parts of these sizes."""
    rank = dist.get_rank(group)
    return Shard(group, sum(sizes[:rank]), sizes[rank], sum(sizes), max(sizes), tuple(sizes))


def sharded(kernel: RowKernel, shard: Shard) -> RowKernel:
    """Returns a row kernel over the whole vocabulary, made of one over this rank's columns."""
    verbs = _Verbs(kernel, shard)
    return RowKernel(verbs.stats, verbs.grad_, verbs.scratch_bytes, target_logits=kernel.target_logits, shard=shard)


@dataclass(frozen=True)
class _Verbs:
    """Has the verbs over the whole vocabulary, by those of `kernel` on this rank's columns."""

    kernel: RowKernel
    shard: Shard

    def scratch_bytes(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        return self.kernel.scratch_bytes(self.shard.largest, dtype, device)

    def stats(self, logits: Tensor, targets: Tensor, cap: float | None, entropy: bool) -> RowState:
        column, here = self.shard.columns(targets)
        mine = self._local(logits, column, cap, entropy)
        whole = mine.max.clone()
        dist.all_reduce(whole, dist.ReduceOp.MAX, group=self.shard.group)
        none = mine.max == -torch.inf  # no column here, or none that is possible
        moved = (mine.max - whole).masked_fill(none, 0)  # from this shard's maximum to that of the row
        factor, all_here = moved.exp(), 1 + mine.rest
        holds = mine.max == whole  # and leaves one column out; one shard may
        parts = [torch.where(holds, mine.rest, factor * all_here).masked_fill(none, 0), holds.to(whole.dtype)]
        if mine.dot is not None:
            parts.append((factor * (mine.dot + moved * all_here)).masked_fill(none, 0))
        nobody = (targets < 0) | (targets >= self.shard.vocab)
        sums = torch.stack([*parts, mine.target.masked_fill(~here, 0).masked_fill(nobody, torch.nan)])
        dist.all_reduce(sums, group=self.shard.group)
        return RowState(whole, sums[0] + (sums[1] - 1).clamp(min=0), sums[2] if entropy else None, sums[-1])

    def _local(self, logits: Tensor, column: Tensor, cap: float | None, entropy: bool) -> RowState:
        """Returns the state of this shard's columns, of which there may be none."""
        if self.shard.size:
            return self.kernel.stats(logits, column, cap, entropy)
        zero = logits.new_zeros(logits.shape[0], dtype=stats_dtype(logits.dtype))
        return RowState(zero - torch.inf, zero, zero if entropy else None, zero)

    def grad_(
        self,
        logits: Tensor,
        targets: Tensor,
        stats: RowStats,
        g_lp: Tensor,
        g_entropy: Tensor | None,
        cap: float | None,
    ) -> None:
        if self.shard.size == 0:
            return
        column, here = self.shard.columns(targets)
        # The kernel takes the column it is given for the target's. Where it is not, the gradient is put right after.
        x = logits.gather(1, column[:, None]).squeeze(1).to(stats.max.dtype)
        self.kernel.grad_(logits, column, stats, g_lp, g_entropy, cap)
        ordinary = _not_target(x, stats, g_lp, g_entropy, cap).to(logits.dtype)
        found = logits.gather(1, column[:, None]).squeeze(1)
        logits.scatter_(1, column[:, None], torch.where(here, found, ordinary)[:, None])


def _not_target(x: Tensor, stats: RowStats, g_lp: Tensor, g_entropy: Tensor | None, cap: float | None) -> Tensor:
    """Returns −π_j (g_lp + g_H (log π_j + H)), times the slope of the soft-cap, of one logit a row [C]."""
    z = x if cap is None else cap * torch.tanh(x / cap)
    log_p = (z - stats.max) - stats.log_sum
    pull = g_lp
    if g_entropy is not None:
        assert stats.entropy is not None
        pull = pull + g_entropy * (log_p.clamp(min=_FLOOR) + stats.entropy)
    dz = -log_p.exp() * pull
    return dz if cap is None else dz * (1 - (z / cap).square())


class ShardedSource(LinearSource):
    """Makes logits of this rank's columns; the gradient of the hidden states is summed over the ranks."""

    def __init__(self, shard: Shard, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.shard = shard
        self.row_bytes = row_bytes(shard.largest, self.dtype)

    def _target_logits(self, verb: TargetLogitsVerb, targets: Tensor) -> Tensor:
        """Returns those of the whole vocabulary: each is known to the rank that holds its column."""
        column, here = self.shard.columns(targets)
        found = torch.zeros(targets.shape, dtype=self.wide, device=self.device)
        if self.shard.size:
            found = super()._target_logits(verb, column).masked_fill(~here, 0)
        dist.all_reduce(found, group=self.shard.group)
        return found

    def gradients(self) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = super().gradients()
        if d_hidden is not None:
            # Summed in the accumulators' precision, so that it is rounded once more at most.
            wide = d_hidden.to(self.wide)
            dist.all_reduce(wide, group=self.shard.group)
            d_hidden = wide.to(d_hidden.dtype)
        return d_hidden, d_weight, d_bias


class _Gather(torch.autograd.Function):
    """Gathers rows of all shards [V, ...]. Every rank computes the whole gradient, and keeps its rows."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        padded = part.new_zeros(shard.largest, *part.shape[1:])
        padded[: shard.size] = part
        parts = [torch.empty_like(padded) for _ in shard.sizes]
        dist.all_gather(parts, padded, group=shard.group)
        return torch.cat([rows[:size] for rows, size in zip(parts, shard.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.shard.offset : ctx.shard.offset + ctx.shard.size], None


def gather(part: Tensor, shard: Shard) -> Tensor:
    """Returns the whole of a sharded weight or bias, for the backend that materialises."""
    whole: Tensor = _Gather.apply(part, shard)
    return whole


def local_parts(caller: str, hidden: Any, weight: Any, bias: Any, group: Any) -> tuple[Any, Any, Any, Any]:
    """Returns (hidden, weight, bias, group) with DTensors unwrapped: a weight that is Shard(0) brings its group along.
    Their gradients become DTensors again on the way back."""
    if "torch.distributed.tensor" not in sys.modules:  # then there are none
        return hidden, weight, bias, group
    from torch.distributed.tensor import DTensor

    if isinstance(hidden, DTensor):
        if not all(p.is_replicate() for p in hidden.placements):
            raise ValueError(
                f"{caller}: hidden must be a plain tensor or a replicated DTensor; got placements {hidden.placements}"
            )
        hidden = hidden.to_local()
    if not isinstance(weight, DTensor):
        return hidden, weight, bias, group
    sharded = [i for i, p in enumerate(weight.placements) if not p.is_replicate()]
    if len(sharded) > 1 or not all(weight.placements[i].is_shard(0) for i in sharded):
        raise ValueError(
            f"{caller}: weight must be a plain tensor or a DTensor, replicated or Shard(0) over one dimension of its "
            f"mesh; got placements {weight.placements}"
        )
    if isinstance(bias, DTensor) != (bias is not None) or (bias is not None and bias.placements != weight.placements):
        raise ValueError(f"{caller}: bias must be a DTensor with the placements of weight, {weight.placements}")
    if sharded:
        own = weight.device_mesh.get_group(sharded[0])
        if group is not None and group is not own:
            raise ValueError(
                f"{caller}: group must be None or that of weight's mesh, for a DTensor weight; got another"
            )
        group = own
    return hidden, weight.to_local(), None if bias is None else bias.to_local(), group
