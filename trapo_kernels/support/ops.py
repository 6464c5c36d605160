"""This file makes the functions of autograd.py and gathered.py operators of torch.library, for torch.compile:
see the ops.py above.

trapo_kernels::support_values             inside, outside and entropy of every row [N]
trapo_kernels::support_values_backward    its gradients, by recomputing the logits
trapo_kernels::gathered_logits            logits of the support's ids alone
trapo_kernels::gathered_logits_backward   its gradients, by gathering again
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.base import RowStats, stats_dtype
from ..backends.dispatch import pick
from ..call import Call, Named, wanted
from ..chunks.selection import Selection
from ..head import Head
from ..ops import fake_gradients, finish, loss_backward, save_loss, three
from . import gathered
from .autograd import SupportLoss, make_job, run, run_backward, run_loss
from .rows import SupportValues
from .topk_terms import Teacher

__all__ = ["run_gathered", "run_support", "run_topk"]

_PARAMS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor ids"
_HEAD = "float temperature, float? softcap, float logit_scale, str backend"
_WANTS = "bool want_hidden, bool want_weight, bool want_bias"


def run_support(call: Call, kernel: Named, ids: Tensor, active: Tensor, entropy: bool) -> SupportValues:
    """Returns values of all rows [N], zero where not active."""
    inside, outside, found, *_ = torch.ops.trapo_kernels.support_values(
        *call.params, ids, active, entropy, *call.head.options, kernel.name, *wanted(call.params)
    )
    return SupportValues(inside, outside, found if entropy else None)


def run_gathered(call: Call, ids: Tensor) -> Tensor:
    """Returns logits of the ids [N, K]."""
    found: Tensor = torch.ops.trapo_kernels.gathered_logits(*call.params, ids, call.head.scale, *wanted(call.params))
    return found


def run_topk(
    call: Call, kernel: Named, ids: Tensor, active: Tensor, teacher: Teacher, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (Σ weights · divergences; of all rows [N] the divergences and the tail's log-mass, zero where not
    active)."""
    total, values, *_ = torch.ops.trapo_kernels.topk_divergence(
        *call.params, ids, active, teacher.logprobs, weights, teacher.kind, teacher.tail, teacher.beta,
        *call.head.options, kernel.name, *wanted(call.params),
    )  # fmt: skip
    tokens, tail = values.unbind(0)
    return total, tokens, tail


def _op(name: str, schema: str) -> Any:
    return torch.library.custom_op(f"trapo_kernels::{name}", mutates_args=(), schema=schema)


def _job(params: Any, ids: Tensor, selection: Selection, head_and_wants: Any) -> Any:
    *options, backend, hidden, weight, bias = head_and_wants
    kernel = pick(backend, "torch.compile", params[0].device).kernel
    assert kernel is not None
    return make_job(kernel, Head(*options), selection, ids, (hidden, weight, bias))


@_op(
    "support_values",
    f"({_PARAMS}, Tensor active, bool entropy, {_HEAD}, {_WANTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def support_values(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, active: Tensor, entropy: bool, *others: Any
) -> tuple[Tensor, ...]:
    """Returns (inside, outside, entropy or empty, and the rest's statistics: logprobs, max, log_sum, entropy or
    empty)."""
    params, selection = (hidden, weight, bias), Selection.choose(active)
    job, mine = _job(params, ids, selection, others)
    values, stats = run(job, mine, params, entropy)
    none = values.outside.new_empty(0)
    found = [*values, *(None if t is None else selection.spread(t) for t in stats)]
    return tuple(none.clone() if t is None else t.clone() for t in found)


@support_values.register_fake
def _(hidden: Tensor, weight: Any, bias: Any, ids: Tensor, active: Any, entropy: bool, *_: Any) -> tuple[Tensor, ...]:
    n, wide = hidden.shape[0], hidden.new_empty(0, dtype=stats_dtype(hidden.dtype))
    h = n if entropy else 0
    return wide.new_empty(n, ids.shape[1]), *(wide.new_empty(size) for size in (n, h, n, n, n, h))


@_op(
    "support_values_backward",
    f"({_PARAMS}, Tensor active, Tensor logprobs, Tensor max, Tensor log_sum, Tensor entropy, Tensor? g_inside, "
    f"Tensor? g_outside, Tensor? g_entropy, {_HEAD}, {_WANTS}) -> (Tensor, Tensor, Tensor)",
)
def support_values_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    active: Tensor,
    logprobs: Tensor,
    top: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    g_inside: Tensor | None,
    g_outside: Tensor | None,
    g_entropy: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gradients of hidden states, weight and bias, accumulated in the statistics' precision."""
    params, selection = (hidden, weight, bias), Selection.choose(active)
    job, mine = _job(params, ids, selection, others)
    stats = RowStats(logprobs, top, log_sum, entropy if entropy.numel() else None).map(selection.take)
    found = run_backward(job, mine, params, stats, (g_inside, g_outside, g_entropy))
    wide = [None if d is None else d.to(stats_dtype(d.dtype)) for d in found]
    return three(tuple(wide), logprobs)


@support_values_backward.register_fake
def _(hidden: Tensor, weight: Any, bias: Any, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(hidden, weight, bias, others[-3:], wide_chunks=True)


def _save_support(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, bias, ids, active, _, *ctx.others = inputs
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, ids, active, *output[3:])


def _support_backward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
    hidden, weight, bias, ids, active, *stats = ctx.saved_tensors
    entropy = incoming[2] if stats[-1].numel() else None
    found = support_values_backward(
        hidden, weight, bias, ids, active, *stats, *incoming[:2], entropy, *ctx.others
    )  # fmt: skip
    return *finish(found, (hidden, weight, bias), ctx.others[-3:], None), *(None,) * (3 + len(ctx.others))


support_values.register_autograd(_support_backward, setup_context=_save_support)


@_op(
    "topk_divergence",
    f"({_PARAMS}, Tensor active, Tensor teacher_logprobs, Tensor weights, str kind, str tail, float beta, {_HEAD}, "
    f"{_WANTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def topk_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    active: Tensor,
    teacher_logprobs: Tensor,
    weights: Tensor,
    kind: str,
    tail: str,
    beta: float,
    *others: Any,
) -> tuple[Tensor, ...]:
    """Returns (Σ weights · divergences, those and the tail's log-mass [2, N], and the gradients of the sum)."""
    params, selection = (hidden, weight, bias), Selection.choose(active, weights != 0)
    job, mine = _job(params, ids, selection, others)
    teacher = Teacher.of(kind, tail, beta, teacher_logprobs, ids, weight.shape[0]).map(selection.take)
    loss = SupportLoss(teacher.of_values, selection.counting(selection.take(weights)))
    tokens, left, grads = run_loss(job, mine, params, loss)
    total = loss.total(tokens)
    return total, torch.stack([selection.spread(tokens), selection.spread(left)]), *three(grads, total)


@topk_divergence.register_fake
def _(hidden: Tensor, weight: Any, bias: Any, *others: Any) -> tuple[Tensor, ...]:
    wide = hidden.new_empty((), dtype=stats_dtype(hidden.dtype))
    return wide, wide.new_empty(2, hidden.shape[0]), *fake_gradients(hidden, weight, bias, others[-3:])


topk_divergence.register_autograd(loss_backward, setup_context=save_loss)


@_op("gathered_logits", f"({_PARAMS}, float scale, {_WANTS}) -> Tensor")
def gathered_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, scale: float, *_: bool) -> Tensor:
    """Returns scale · (h · W[id] + b[id]) [N, K], 0 where the id is −1."""
    return gathered.run((hidden, weight, bias), ids, scale)


@gathered_logits.register_fake
def _(hidden: Tensor, weight: Any, bias: Any, ids: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(ids.shape, dtype=stats_dtype(hidden.dtype))


@_op("gathered_logits_backward", f"({_PARAMS}, float scale, Tensor grad, {_WANTS}) -> (Tensor, Tensor, Tensor)")
def gathered_logits_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, scale: float, grad: Tensor, *wants: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gradients of hidden states, weight and bias, in the statistics' precision."""
    found = gathered.run_backward((hidden, weight, bias), ids, scale, grad, wants)
    return three(found, grad)


@gathered_logits_backward.register_fake
def _(hidden: Tensor, weight: Any, bias: Any, ids: Any, scale: Any, grad: Any, *wants: Any) -> tuple[Tensor, ...]:
    return fake_gradients(hidden, weight, bias, wants, wide_chunks=True)


def _save_gathered(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, bias, ids, ctx.scale, *ctx.wants = inputs
    ctx.save_for_backward(hidden, weight, bias, ids)


def _gathered_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    hidden, weight, bias, ids = ctx.saved_tensors
    found = gathered_logits_backward(hidden, weight, bias, ids, ctx.scale, grad, *ctx.wants)
    return *finish(found, (hidden, weight, bias), ctx.wants, None), *(None,) * 5


gathered_logits.register_autograd(_gathered_backward, setup_context=_save_gathered)
