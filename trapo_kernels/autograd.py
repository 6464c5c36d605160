"""This file has the two functions of autograd, by the chunk loop of stream.py, and what they are told beside their
parameters.

    StreamedLogprobs   values of tokens in one pass; the backward recomputes the logits of rows with a gradient
    StreamedLoss       the loss and its gradients in one pass; the backward hands the gradients over

The operators of a compiled graph (ops.py) run the same `Job`s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import stream
from .arguments import validate
from .backends.base import RowKernel, RowStats, stats_dtype
from .batch import Batch, PolicyLoss
from .call import Params, in_one_dtype
from .chunks import columns
from .chunks.low_rank import LowRankSource
from .chunks.selection import Selection
from .chunks.sources import LinearSource, LogitsSource, Source, finish
from .head import Head
from .shards.agreement import compare
from .shards.vocab_parallel import ShardedSource
from .statistics import Collector
from .tokens import Slopes

__all__ = [
    "Ask",
    "Deposit",
    "Job",
    "StreamedLogprobs",
    "StreamedLoss",
    "apply",
    "check_backward",
    "finish_all",
    "rows_of",
]
__all__ += ["run_loss"]


@dataclass(frozen=True)
class Ask:
    """Says what is wanted of each token beside its log-probability."""

    entropy: bool = False
    target_logits: bool = False
    extras: Collector | None = None

    @property
    def stats_alone(self) -> bool:
        return not self.target_logits and (self.extras is None or not self.extras.values)


@dataclass(frozen=True)
class Job:
    """Describes one call of the stream: everything but the tensors that have a gradient."""

    kernel: RowKernel
    head: Head
    selection: Selection
    targets: Tensor  # compact
    wants: tuple[bool, ...]  # which params
    tolerance: float = 0.0  # share of the gradient's mass that may be left out
    into: Tensor | None = None  # where the gradient of the weight is added; None: it is handed over

    def source(self, params: Params, selection: Selection, wants: tuple[bool, ...]) -> Source:
        """Returns where logits come from and gradients go."""
        if len(params) == 1:
            (logits,) = params
            assert logits is not None
            return LogitsSource(logits, self.head, selection, wants[0])
        (hidden, weight, bias), adapter = in_one_dtype(params[:3]), params[3:]
        assert hidden is not None
        assert weight is not None
        # Zero times what a caller padded with would be NaN in d_weight.
        hidden = selection.counting(hidden)
        if adapter:
            a, b = adapter
            assert a is not None
            assert b is not None
            return LowRankSource(a, b, hidden, weight, bias, self.head, selection, wants=wants)
        which = (wants[0], wants[1], wants[2])
        if self.kernel.shard is not None:
            shard = self.kernel.shard
            return ShardedSource(shard, hidden, weight, bias, self.head, selection, wants=which, into=self.into)
        return LinearSource(
            hidden, weight, bias, self.head, selection, wants=which, tolerance=self.tolerance, into=self.into
        )

    def loop(self, params: Params, wants: tuple[bool, ...]) -> stream.Loop:
        """Returns what the chunk loop runs over."""
        return stream.Loop(
            self.source(params, self.selection, wants), self.kernel, self.selection, self.targets, self.head
        )

    def forward_only(self, params: Params, ask: Ask) -> RowStats:
        """Returns the statistics of the rows, by the kernel that writes no logits where there is one and nothing else
        is asked."""
        linear_stats = self.kernel.linear_stats
        if linear_stats is not None and len(params) == 3 and ask.stats_alone:
            hidden, weight, bias = in_one_dtype(params)
            assert hidden is not None
            assert weight is not None
            hidden = self.selection.counting(self.selection.take(hidden))
            found = linear_stats(hidden, weight, bias, self.targets, self.head, ask.entropy)
            if found is not None:
                return found
        loop = self.loop(params, (False,) * len(params))
        return stream.forward(loop, entropy=ask.entropy, extras=ask.extras)

    def by_columns(self, params: Params, selection: Selection) -> bool:
        """Returns whether to recompute over blocks of the vocabulary rather than over chunks of rows."""
        if len(params) != 3 or not self.kernel.by_columns or self.into is not None:
            return False
        hidden, weight, _ = params
        assert hidden is not None
        assert weight is not None
        if hidden.dtype == torch.float16:  # whose factor (chunks/sources.py) blocks of columns do not have
            return False
        return columns.pays(selection.size, weight.shape[0], hidden.dtype.itemsize, hidden.device.type)


def rows_of(values: Tensor | None, rows: slice) -> Tensor | None:
    """Returns those rows of what may not be there."""
    return None if values is None else values[rows]


def apply(function: Any, caller: str, *args: Any) -> Any:
    """Returns the result of a function of autograd.

    Raises:
        RuntimeError: inside a transform of torch.func.
    """
    try:
        return function.apply(*args)
    except RuntimeError as error:
        if "functorch transforms" not in str(error):
            raise
    raise RuntimeError(f"{caller}: a streamed loss is not for torch.func transforms; use backend='reference'")


def finish_all(
    grads: Sequence[Tensor | None], params: Params, scale: Tensor | None, give: bool = True
) -> tuple[Tensor | None, ...]:
    """Returns accumulated gradients as those of the parameters, multiplied by `scale`; `give`: as `sources.finish`."""
    return tuple(
        None if grad is None or like is None else finish(grad, like, scale, give)
        for grad, like in zip(grads, params, strict=True)
    )


def check_backward(caller: str, *incoming: Tensor | None) -> None:
    """Checks that the backward of a streamed loss is asked for one gradient, and for none of its own.

    Raises:
        RuntimeError: it is asked for more.
    """
    # Grad mode is on inside a backward under create_graph=True alone. Going on would give zero for a second derivative.
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{caller}: create_graph must be False, a streamed loss has no second derivative; use backend='reference'"
        )
    validate.refuse_batched(caller, *incoming)


class StreamedLogprobs(torch.autograd.Function):
    """Computes statistics in one pass; the backward recomputes the logits of rows that have an incoming gradient."""

    @staticmethod
    def forward(ctx: Any, job: Job, ask: Ask, *params: Tensor | None) -> tuple[Tensor | None, ...]:
        stats = job.forward_only(params, ask)
        ctx.job, ctx.params = job, len(params)
        ctx.save_for_backward(*params, *stats)
        ctx.set_materialize_grads(False)
        return stats.logprobs, stats.entropy, stats.target_logits if ask.target_logits else None

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
        check_backward("linear_logprobs", *incoming)
        job, saved = ctx.job, ctx.saved_tensors
        params, stats = saved[: ctx.params], RowStats(*saved[ctx.params :])
        live = torch.zeros_like(stats.logprobs, dtype=torch.bool)
        for g in incoming:
            live = live if g is None else live | (g != 0)
        if job.kernel.shard is not None:
            which = {"gradients": live, "trained parameters": (job.wants, [g is None for g in incoming])}
            compare("linear_logprobs", job.kernel.shard.group, live.device, which)
        selection, kept = job.selection.narrow(live)
        g_lp, g_entropy, g_logit = (None if g is None else selection.counting(kept.take(g)) for g in incoming)
        stats, targets = selection.counting_stats(stats.map(kept.take)), kept.take(job.targets)
        if g_logit is None and job.by_columns(params, selection):
            hidden, weight, bias = in_one_dtype(params)
            assert weight is not None
            recompute = columns.Recompute(
                job.kernel, job.head, selection.counting(selection.take(hidden)), weight, bias, targets, stats,
                torch.zeros_like(stats.logprobs) if g_lp is None else g_lp, g_entropy, weight_dtype=params[1].dtype,
            )  # fmt: skip
            d_hidden, *others = recompute.gradients(job.wants)
            grads = (None if d_hidden is None else selection.spread(d_hidden), *others)
            return None, None, *finish_all(grads, params, None)
        source = job.source(params, selection, job.wants)
        loop = stream.Loop(source, job.kernel, selection, targets, job.head)
        if g_logit is None:
            _round_once(loop, params, 1.0)
        stream.backward(
            loop, stats,
            lambda at, _: Slopes(rows_of(g_lp, at), rows_of(g_entropy, at), rows_of(g_logit, at)),
            by_logit=g_logit is not None,
        )  # fmt: skip
        return None, None, *finish_all(source.gradients(), params, None)


def _round_once(loop: stream.Loop, params: Params, normalizer: Tensor | float) -> bool:
    """Makes the gradient of the weight bf16 from the start where it can be, and all gradients divided by `normalizer`,
    which is looked at where that can be alone; returns whether it did."""
    source, passes = loop.source, loop.own_passes
    if not isinstance(source, LinearSource) or passes is None or not passes.rounds_once or source.d_weight is None:
        return False
    same = source.operands == torch.bfloat16 and params[1] is not None and params[1].dtype == source.operands
    if not same or source.into is not None or source.tolerance or not normalizer > 0:
        return False
    source.round_once(1 / float(normalizer))
    return True


def run_loss(
    job: Job, batch: Batch, params: Params, *, divide: bool = False
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...], Tensor | None, bool]:
    """Returns (values of the tokens as `Batch.flat` has them, gradients of the sum of their losses; the share of the
    gradients' mass that was left out, or None; whether gradients are divided by the normalizer, which they are with
    `divide` where that saves a rounding)."""
    loop = job.loop(params, job.wants)
    source = loop.source
    extras = Collector(batch.statistics, job.selection.size, stats_dtype(source.dtype), source.device)
    if not any(job.wants):
        stats = job.forward_only(params, Ask(True, batch.objective.reads_logit, extras))
        return batch.flat(stats, extras), source.gradients(), None, False
    divided = False
    if divide and not extras.values and not batch.objective.reads_logit:
        divided = _round_once(loop, params, batch.normalizer)
    stats = stream.forward(
        loop,
        entropy=True,
        slopes=lambda at, stats: batch.slopes(at, stats, extras),
        fused=batch.fused(job.kernel),
        extras=extras,
        by_logit=batch.objective.reads_logit,
    )
    left_out = source.left_out if isinstance(source, LinearSource) else None
    return batch.flat(stats, extras), source.gradients(), left_out, divided


class StreamedLoss(torch.autograd.Function):
    """Computes loss and gradients in one pass over the logits; the backward hands the gradients over. What else there
    is to report, which has no gradient, is left in `found`."""

    @staticmethod
    def forward(
        ctx: Any, job: Job, batch: Batch, left_out: Tensor | None, found: list[PolicyLoss], *params: Tensor | None
    ) -> Tensor:
        values, ctx.grads, share, ctx.divided = run_loss(job, batch, params, divide=job.targets.device.type == "cpu")
        result = batch.result(None, batch.values(*values), None, left_out if share is None else share)
        found.append(result)
        ctx.job, ctx.batch = job, batch
        ctx.save_for_backward(*params)
        ctx.set_materialize_grads(False)
        return result.loss.clone()  # which may be changed in place, as a metric may not

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None) -> tuple[Any, ...]:
        check_backward("linear_policy_loss", g_loss)
        params: Params = ctx.saved_tensors
        if g_loss is None:
            return (None,) * (4 + len(params))
        # The first backward gives its gradients away (they are scaled in place, and become `.grad`); a second one
        # through a retained graph makes its own.
        grads: tuple[Tensor | None, ...] | None = ctx.grads
        ctx.grads = None
        if grads is None:
            _, grads, _, _ = run_loss(ctx.job, ctx.batch, params, divide=ctx.divided)
        if ctx.divided:
            return *(None,) * 4, *finish_all(grads, params, None if g_loss == 1 else g_loss)
        if ctx.job.into is None:
            return *(None,) * 4, *finish_all(grads, params, g_loss / ctx.batch.normalizer)
        return *(None,) * 4, *finish_all(grads, params, _one(g_loss, ctx.job.into))


def _one(g_loss: Tensor, into: Tensor) -> Tensor:
    """Returns an incoming gradient, which must be 1, since the weight's has been added up for that. A GPU is not waited
    for: NaN in all gradients says there that it was another.

    Raises:
        RuntimeError: it is seen to be another.
    """
    if g_loss.device.type == "cpu" and g_loss != 1:
        got = f"{float(g_loss):.6g}"
        raise RuntimeError(f"linear_policy_loss: with weight_grad the gradient of the loss must be 1; got {got}")
    if g_loss.device.type != "cpu" and into.numel():
        into[:1, :1] += torch.where(g_loss == 1, 0.0, torch.nan)
    return torch.where(g_loss == 1, g_loss, torch.nan)


class Deposit(torch.autograd.Function):
    """Gives a weight as it is, whose gradient is added to a tensor and goes no further."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, into: Tensor) -> Tensor:
        ctx.into = into
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.into += grad
        return None, None
