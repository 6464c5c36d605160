"""This file has the functions of autograd of losses on a support, by the chunk loop of rows.py.

    StreamedSupport        values of rows in one pass; the backward recomputes the logits of rows with a gradient
    StreamedSupportLoss    a loss that is known beforehand, and its gradients, in one pass: three GEMMs

All of them take and give all rows [N]. Rows that are left out have zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..autograd import Job, check_backward, finish_all
from ..backends.base import RowKernel, RowStats, stats_dtype
from ..call import Params, in_one_dtype
from ..chunks import columns
from ..chunks.selection import Selection
from ..formulas.custom import autograd_on
from ..head import Head
from ..shards.agreement import compare
from . import rows
from .rows import SupportSlopes, SupportValues, targets_of

__all__ = ["StreamedSupport", "StreamedSupportLoss", "SupportLoss", "make_job", "run", "run_backward", "run_loss"]


def make_job(
    kernel: RowKernel, head: Head, selection: Selection, ids: Tensor, wants: tuple[bool, ...]
) -> tuple[Job, Tensor]:
    """Makes (a call of the stream, the compact ids [n, K]) of ids [N, K], none of which stands twice in a row."""
    mine = selection.take(ids)
    if selection.inside is not None:
        mine = mine.masked_fill(~selection.inside[:, None], -1)
    return Job(kernel, head, selection, targets_of(mine), wants), mine


def run(job: Job, ids: Tensor, params: Params, entropy: bool) -> tuple[SupportValues, RowStats]:
    """Returns (values of all rows [N], statistics of the rest of the compact rows [n])."""
    source = job.source(params, job.selection, (False,) * len(params))
    values, stats = rows.forward(source, job.kernel, job.selection, ids, job.head, entropy)
    return values.map(job.selection.spread), stats


def run_backward(
    job: Job, ids: Tensor, params: Params, stats: RowStats, incoming: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Returns accumulated gradients of the parameters, for gradients [N] that come in; all else is of the compact
    rows."""
    g_inside, g_outside, g_entropy = (None if g is None else job.selection.take(g) for g in incoming)
    wide = stats.max.dtype
    g_inside = ids.new_zeros(ids.shape, dtype=wide) if g_inside is None else g_inside.to(wide).masked_fill(ids < 0, 0)
    g_outside = torch.zeros_like(stats.max) if g_outside is None else g_outside
    live = (g_inside != 0).any(1) | (g_outside != 0)
    live = live if g_entropy is None else live | (g_entropy != 0)
    if job.kernel.shard is not None:
        which = {"gradients": live, "trained parameters": (job.wants, [g is None for g in incoming])}
        compare("linear_support_logprobs", job.kernel.shard.group, live.device, which)
    selection, kept = job.selection.narrow(live)
    ids = kept.take(ids)
    stats = selection.counting_stats(stats.map(kept.take))
    g_inside, g_outside = (selection.counting(kept.take(g)) for g in (g_inside, g_outside))
    g_entropy = None if g_entropy is None else selection.counting(kept.take(g_entropy))
    if job.by_columns(params, selection):
        hidden, weight, bias = in_one_dtype(params)
        assert hidden is not None
        assert weight is not None
        recompute = columns.Recompute(
            job.kernel, job.head, selection.counting(selection.take(hidden)), weight, bias, targets_of(ids), stats,
            -g_outside, g_entropy, (ids, g_inside), None if params[1] is None else params[1].dtype,
        )  # fmt: skip
        d_hidden, *others = recompute.gradients(job.wants)
        return None if d_hidden is None else selection.spread(d_hidden), *others
    source = job.source(params, selection, job.wants)
    slopes = SupportSlopes(g_inside, g_outside, g_entropy)
    rows.backward(source, job.kernel, selection, ids, job.head, stats, slopes)
    return source.gradients()


class StreamedSupport(torch.autograd.Function):
    """Computes values in one pass; the backward recomputes the logits of rows that have an incoming gradient."""

    @staticmethod
    def forward(ctx: Any, job: Job, ids: Tensor, entropy: bool, *params: Tensor | None) -> tuple[Tensor | None, ...]:
        values, stats = run(job, ids, params, entropy)
        ctx.job, ctx.params = job, len(params)
        ctx.save_for_backward(*params, ids, *stats)
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
        check_backward("linear_support_logprobs", *incoming)
        saved = ctx.saved_tensors
        params, ids, stats = saved[: ctx.params], saved[ctx.params], RowStats(*saved[ctx.params + 1 :])
        found = run_backward(ctx.job, ids, params, stats, incoming)
        return None, None, None, *finish_all(found, params, None)


# Losses that are known beforehand ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SupportLoss:
    """Is Σ weights · tokens over rows: `of` gives the loss of each token [C] of compact rows, differentiable in their
    values. Rows of weight 0 add nothing, not even what is infinite."""

    of: Callable[[slice, SupportValues], Tensor]
    weights: Tensor  # compact [n]

    def total(self, tokens: Tensor) -> Tensor:
        return (self.weights * tokens.masked_fill(self.weights == 0, 0)).sum()

    def slopes(self, at: slice, values: SupportValues, tokens: Tensor) -> SupportSlopes:
        """Computes the derivatives of the rows' sum; their losses go into `tokens` [n]."""
        weights = self.weights[at]
        with autograd_on():
            inside, outside = (t.detach().requires_grad_() for t in values[:2])
            found = self.of(at, SupportValues(inside, outside, None))
            summed = torch.where(weights == 0, 0, found) * weights
            g_inside, g_outside = torch.autograd.grad(summed.sum(), (inside, outside), allow_unused=True)
        tokens[at] = found.detach()
        dead = weights == 0
        g_inside = torch.zeros_like(inside) if g_inside is None else g_inside.masked_fill(dead[:, None], 0)
        g_outside = torch.zeros_like(outside) if g_outside is None else g_outside.masked_fill(dead, 0)
        return SupportSlopes(g_inside, g_outside, None)


def run_loss(
    job: Job, ids: Tensor, params: Params, loss: SupportLoss
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Returns (the loss of each compact token [n], the rest's log-mass [n], gradients of Σ weights · tokens,
    undivided)."""
    source = job.source(params, job.selection, job.wants)
    tokens = loss.weights.new_empty(job.selection.size, dtype=stats_dtype(source.dtype))
    trains = any(job.wants)
    values, _ = rows.forward(
        source, job.kernel, job.selection, ids, job.head, False,
        slopes=(lambda at, found: loss.slopes(at, found, tokens)) if trains else None,
    )  # fmt: skip
    first = job.selection.with_gradient if trains else 0
    if first < job.selection.size:
        rest = slice(first, job.selection.size)
        tokens[rest] = loss.of(rest, values.map(lambda t: t[rest]))
    tail = rows.normalize(values.inside, values.outside)[1]
    return tokens, tail, source.gradients()


class StreamedSupportLoss(torch.autograd.Function):
    """Computes Σ weights · tokens and its gradients in one pass over the logits; the backward hands the gradients
    over."""

    @staticmethod
    def forward(
        ctx: Any, job: Job, ids: Tensor, loss: SupportLoss, normalizer: Tensor, *params: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, tail, ctx.grads = run_loss(job, ids, params, loss)
        ctx.job, ctx.loss, ctx.normalizer = job, loss, normalizer
        ctx.save_for_backward(ids, *params)
        ctx.mark_non_differentiable(tokens, tail)
        ctx.set_materialize_grads(False)
        return loss.total(tokens) / normalizer, tokens, tail

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, *others: Any) -> tuple[Any, ...]:
        check_backward("linear_topk_divergence", g_loss)
        ids, *params = ctx.saved_tensors
        if g_loss is None:
            return (None,) * (4 + len(params))
        # As of StreamedLoss: the first backward gives the gradients away, a second one makes its own.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, _, grads = run_loss(ctx.job, ids, tuple(params), ctx.loss)
        return None, None, None, None, *finish_all(grads, tuple(params), g_loss / ctx.normalizer)
