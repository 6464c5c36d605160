"""This file makes the streamed losses operators of torch.library, for torch.compile: what a compiled graph calls
instead of tracing into chunk loops whose sizes depend on data.

    trapo_kernels::token_values            log π(y), H, z_y and statistics of every row
    trapo_kernels::token_values_backward   its gradients, by recomputing the logits
    trapo_kernels::policy_loss             Σ of token losses, the same values, the gradients of that sum: one pass
    trapo_kernels::sums_of_later           Σ over the later tokens of a token's sequence
    trapo_kernels::divergence              Σ of divergences of two heads, each token's, the gradients of that sum

Operators take and give all rows [N], with zeros at those that are left out: their shapes follow from shapes. Inside is
the code that runs without a compiler. Gradients that are not wanted are empty tensors. An objective travels as a string
(`objective_key`), so that a graph holds no Python object.

No vocabulary-parallel heads: their collectives would be hidden from the compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import stream, tokens
from .arguments.scalars import constant
from .autograd import Job, finish_all, rows_of, run_loss
from .backends.base import RowStats, stats_dtype
from .backends.dispatch import pick
from .batch import Batch
from .call import Call, Named, Params, wanted
from .chunks.selection import Selection
from .chunks.sources import d_hidden_dtype
from .divergence import heads
from .divergence.references import from_lists
from .head import Head
from .objective import FIELDS, Objective
from .reference import TokenValues
from .statistics import Collector
from .tokens import Slopes

__all__ = [
    "divergence",
    "fake_gradients",
    "finish",
    "objective_key",
    "policy_loss",
    "run_policy_loss",
    "run_token_values",
    "sums_of_later",
]
__all__ += ["loss_backward", "save_loss", "three", "token_values", "token_values_backward"]

_HEAD = "float temperature, float? softcap, float logit_scale, str backend"
_PARAMS = "Tensor first, Tensor? weight, Tensor? bias"
_WANTS = "bool want_first, bool want_weight, bool want_bias"

_objectives: dict[str, Objective] = {}


# Equal objectives share a graph; for another that is not equal to it there is another graph.
torch.utils._pytree.register_constant(Objective)


def objective_key(objective: Objective) -> str:
    """Returns a name for an objective inside a graph. Equal objectives have equal names."""
    # Field by field: an object that is made inside of what is compiled does not exist while that is traced.
    return _key(*(_setting(getattr(objective, name)) for name in FIELDS))


def _setting(value: Any) -> Any:
    found = constant(value)
    return value if found is None else found


@torch.compiler.assume_constant_result
def _key(*settings: Any) -> str:
    """Returns the name of the objective of these settings, which stays alive here."""
    shown = [f"{id(value):x}" if callable(value) else repr(value) for value in settings]
    key = ", ".join(shown)
    _objectives[key] = Objective(*settings)
    return key


# What a compiled graph calls ---------------------------------------------------------------------------------


def run_token_values(
    call: Call, kernel: Named, active: Tensor, targets: Tensor, entropy: bool, statistics: tuple[str, ...]
) -> TokenValues:
    """Returns the values of all rows [N], zero where not active."""
    logprobs, entropies, target, _, _, found = torch.ops.trapo_kernels.token_values(
        *_three_params(call.params), targets, active, entropy, list(statistics), *_last(call, kernel)
    )
    by_name = {name: found[i] for i, name in enumerate(statistics)}
    return TokenValues(logprobs, entropies if entropy else None, target, by_name)


def run_policy_loss(call: Call, kernel: Named, batch: Batch) -> tuple[Tensor, TokenValues]:
    """Returns a loss in a single pass, and the values of all rows [N]."""
    assert batch.dense is not None
    total, values, *_ = torch.ops.trapo_kernels.policy_loss(
        *_three_params(call.params), batch.targets, batch.dense.active, batch.dense.live, batch.expert,
        *batch.inputs.values(), batch.weights, objective_key(batch.objective), list(batch.statistics),
        *_last(call, kernel),
    )  # fmt: skip
    return total / batch.normalizer, batch.values(*values.unbind(0))


def _three_params(params: Params) -> Params:
    """Returns (first, weight, bias): logits have neither of the others."""
    return params if len(params) == 3 else (params[0], None, None)


def _last(call: Call, kernel: Named) -> tuple[Any, ...]:
    """Returns the last arguments of all operators."""
    first, weight, bias = (*wanted(call.params), False, False)[:3]
    return *call.head.options, kernel.name, first, weight, bias


# What the operators share ------------------------------------------------------------------------------------


def _params(first: Tensor, weight: Tensor | None, bias: Tensor | None) -> Params:
    return (first,) if weight is None else (first, weight, bias)


def _job(selection: Selection, targets: Tensor, params: Any, *head_and_wants: Any) -> Job:
    *options, backend, first, weight, bias = head_and_wants
    kernel = pick(backend, "torch.compile", params[0].device).kernel
    assert kernel is not None
    wants = (first, weight, bias)[: len(params)]
    return Job(kernel, Head(*options), selection, selection.counting(selection.take(targets)), wants)


def three(found: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gradients as an operator does: what there is none of is empty."""
    first, weight, bias = (like.new_empty(0) if d is None else d for d in (*found, None, None)[:3])
    return first, weight, bias


def fake_gradients(
    first: Tensor, weight: Any, bias: Any, wants: Any, wide_chunks: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `three` returns, for a compiler; `wide_chunks`: the gradient of hidden states is in fp32 too."""
    wide = stats_dtype(first.dtype)
    dtypes = (first.dtype if weight is None else d_hidden_dtype(first.dtype, first.device, wide_chunks), wide, wide)
    found = [
        torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format) if wanted else None
        for t, dtype, wanted in zip((first, weight, bias), dtypes, wants, strict=True)
    ]
    return three(tuple(found), first.new_empty(0, dtype=wide))


def finish(grads: Any, params: Any, wants: Any, scale: Tensor | None) -> tuple[Tensor | None, ...]:
    """Returns gradients in the dtypes of the parameters; scaled in the accumulators' precision. An operator's outputs
    stay."""
    found = [grad if wanted else None for grad, wanted in zip(grads, wants, strict=True)]
    return finish_all(found, params, scale, give=False)


def _op(name: str, schema: str) -> Any:
    return torch.library.custom_op(f"trapo_kernels::{name}", mutates_args=(), schema=schema)


# Sequences ---------------------------------------------------------------------------------------------------


@_op("sums_of_later", "(Tensor values, Tensor row) -> Tensor")
def sums_of_later(values: Tensor, row: Tensor) -> Tensor:
    """Returns Σ over the later tokens of the same sequence [n]."""
    return tokens.sums_of_later(values, row)


@sums_of_later.register_fake
def _(values: Tensor, row: Tensor) -> Tensor:
    return torch.empty_like(values)


# Values of tokens --------------------------------------------------------------------------------------------


@_op(
    "token_values",
    f"({_PARAMS}, Tensor targets, Tensor active, bool entropy, str[] statistics, {_HEAD}, {_WANTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def token_values(
    first: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    active: Tensor,
    entropy: bool,
    statistics: list[str],
    *head_and_wants: Any,
) -> tuple[Tensor, ...]:
    """Returns (log π(y), H or empty, z_y, max z, log Σ e^(z − max z), statistics [s, N]) of all selection."""
    params, selection = _params(first, weight, bias), Selection.choose(active)
    job = _job(selection, targets, params, *head_and_wants)
    loop = job.loop(params, (False,) * len(params))
    extras = Collector(tuple(statistics), selection.size, stats_dtype(first.dtype), first.device)
    stats = stream.forward(loop, entropy=entropy, extras=extras)
    values = (stats.logprobs, stats.entropy, stats.target_logits, stats.max, stats.log_sum)
    # Every output is a tensor of its own, as operators' must be.
    spread = [stats.logprobs.new_empty(0) if t is None else selection.spread(t).clone() for t in values]
    found = [selection.spread(t) for t in extras.values.values()]
    return *spread, torch.stack(found) if found else stats.logprobs.new_empty(0, selection.total)


@token_values.register_fake
def _(
    first: Tensor, weight: Any, bias: Any, targets: Any, active: Any, entropy: bool, statistics: list[str], *_: Any
) -> tuple[Tensor, ...]:
    n, wide = first.shape[0], first.new_empty(0, dtype=stats_dtype(first.dtype))
    sizes = (n, n if entropy else 0, n, n, n)
    return *(wide.new_empty(size) for size in sizes), wide.new_empty(len(statistics), n)


@_op(
    "token_values_backward",
    f"({_PARAMS}, Tensor targets, Tensor active, Tensor logprobs, Tensor entropy, Tensor max, Tensor log_sum, "
    f"Tensor? g_logprobs, Tensor? g_entropy, Tensor? g_target, {_HEAD}, {_WANTS}) -> (Tensor, Tensor, Tensor)",
)
def token_values_backward(
    first: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    active: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    top: Tensor,
    log_sum: Tensor,
    g_logprobs: Tensor | None,
    g_entropy: Tensor | None,
    g_target: Tensor | None,
    *head_and_wants: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of first, weight and bias, accumulated in the statistics' precision."""
    params, incoming, live = _params(first, weight, bias), (g_logprobs, g_entropy, g_target), torch.zeros_like(active)
    for g in incoming:
        live = live if g is None else live | (g != 0)
    selection = Selection.choose(active & live)
    job = _job(selection, targets, params, *head_and_wants)
    stats = RowStats(logprobs, top, log_sum, entropy if entropy.numel() else None).map(selection.take)
    stats = selection.counting_stats(stats)
    g_lp, g_h, g_z = (None if g is None else selection.counting(selection.take(g)) for g in incoming)
    loop = job.loop(params, job.wants)
    stream.backward(
        loop, stats,
        lambda at, _: Slopes(rows_of(g_lp, at), rows_of(g_h, at), rows_of(g_z, at)),
        by_logit=g_z is not None,
    )  # fmt: skip
    return three(loop.source.gradients(), logprobs)


@token_values_backward.register_fake
def _(first: Tensor, weight: Any, bias: Any, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(first, weight, bias, others[-3:])


def _save_token_values(ctx: Any, inputs: Any, output: Any) -> None:
    first, weight, bias, targets, active, _, _, *ctx.others = inputs
    logprobs, entropy, _, top, log_sum, statistics = output
    ctx.mark_non_differentiable(top, log_sum, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(first, weight, bias, targets, active, logprobs, entropy, top, log_sum)


def _token_values_backward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    found = token_values_backward(*saved, *incoming[:3], *ctx.others)
    return *finish(found, saved[:3], ctx.others[-3:], None), *(None,) * (4 + len(ctx.others))


token_values.register_autograd(_token_values_backward, setup_context=_save_token_values)


# Policy losses -----------------------------------------------------------------------------------------------


@_op(
    "policy_loss",
    f"({_PARAMS}, Tensor targets, Tensor active, Tensor live, Tensor expert, Tensor? advantages, Tensor? old_logprobs, "
    "Tensor? ref_logprobs, Tensor? rollout_logprobs, Tensor? policy_weights, Tensor? weights, str objective, "
    f"str[] statistics, {_HEAD}, {_WANTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def policy_loss(
    first: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    active: Tensor,
    live: Tensor,
    expert: Tensor,
    advantages: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    policy_weights: Tensor | None,
    weights: Tensor | None,
    objective: str,
    statistics: list[str],
    *head_and_wants: Any,
) -> tuple[Tensor, ...]:
    """Returns (Σ of token losses, its values [k, N] as `_Batch.flat` has them, and the gradients of the sum)."""
    params, selection = _params(first, weight, bias), Selection.choose(active, live)
    job = _job(selection, targets, params, *head_and_wants)
    inputs = {
        "advantages": advantages,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "policy_weights": policy_weights,
    }
    batch = Batch(
        objective=_objectives[objective],
        selection=selection,
        targets=job.targets,
        expert=selection.take(expert),
        inputs={name: None if t is None else selection.take(t) for name, t in inputs.items()},
        sequences=None,
        weights=None if weights is None else selection.take(weights),
        statistics=tuple(statistics),
        normalizer=torch.ones((), dtype=stats_dtype(first.dtype), device=first.device),
        counts={},
        shape=targets.shape,
    )
    values, grads, *_ = run_loss(job, batch, params)
    total = batch.loss(batch.parts(batch.values(*values)))
    return total, torch.stack([selection.spread(t) for t in values]), *three(grads, total)


@policy_loss.register_fake
def _(first: Tensor, weight: Any, bias: Any, *others: Any) -> tuple[Tensor, ...]:
    objective, statistics = others[10:12]
    count = 2 + _objectives[objective].reads_logit + len(statistics)
    wide = first.new_empty((), dtype=stats_dtype(first.dtype))
    return wide, wide.new_empty(count, first.shape[0]), *fake_gradients(first, weight, bias, others[-3:])


def save_loss(ctx: Any, inputs: Any, output: Any) -> None:
    """Saves what the backward reads of an operator from (three parameters, ..., three wants) to (total, values, three
    gradients of the total)."""
    _, values, *grads = output
    ctx.mark_non_differentiable(values, *grads)
    ctx.set_materialize_grads(False)
    ctx.wants = inputs[-3:]
    # What has no gradient: of a list of tensors none for each.
    lists = [isinstance(i, (list, tuple)) and len(i) > 0 and isinstance(i[0], Tensor) for i in inputs[3:]]
    ctx.none = tuple([None] * len(i) if many else None for i, many in zip(inputs[3:], lists, strict=True))
    ctx.save_for_backward(*inputs[:3], *grads)


def loss_backward(ctx: Any, g_total: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Hands the gradients over that such an operator has made."""
    if g_total is None:
        return (None, None, None, *ctx.none)
    saved = ctx.saved_tensors
    return *finish(saved[3:], saved[:3], ctx.wants, g_total), *ctx.none


policy_loss.register_autograd(loss_backward, setup_context=save_loss)


# Divergences of two heads ------------------------------------------------------------------------------------


@_op(
    "divergence",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor[] ref_first, Tensor[] ref_weights, Tensor[] ref_biases, "
    "Tensor active, Tensor weights, str kind, float beta, float[] shares, float temperature, float? softcap, "
    f"float logit_scale, float ref_temperature, float? ref_softcap, float ref_logit_scale, {_WANTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_first: list[Tensor],
    ref_weights: list[Tensor],
    ref_biases: list[Tensor],
    active: Tensor,
    weights: Tensor,
    kind: str,
    beta: float,
    shares: list[float],
    *heads_and_wants: Any,
) -> tuple[Tensor, ...]:
    """Returns (Σ of the active tokens' weighted divergences, each token's [N], and the gradients of the sum)."""
    selection, wants = Selection.choose(active, weights != 0), heads_and_wants[-3:]
    of_rows = selection.counting(selection.take(weights))
    head, ref_head = Head(*heads_and_wants[:3]), Head(*heads_and_wants[3:6])
    job = heads.Job(kind, beta, head, ref_head, selection, of_rows, weights.new_ones(()), wants, tuple(shares))
    refs = from_lists(ref_first, ref_weights, ref_biases)
    tokens, grads = heads.run(job, refs, (hidden, weight, bias))
    total = heads.weighted_sum(of_rows, tokens)
    return total, selection.spread(tokens).clone(), *three(grads, total)


@divergence.register_fake
def _(hidden: Tensor, weight: Any, bias: Any, *others: Any) -> tuple[Tensor, ...]:
    wide = hidden.new_empty((), dtype=stats_dtype(hidden.dtype))
    return wide, wide.new_empty(hidden.shape[0]), *fake_gradients(hidden, weight, bias, others[-3:], wide_chunks=True)


# Saved and differentiated as a policy loss is: (total, values, three gradients).
divergence.register_autograd(loss_backward, setup_context=save_loss)
