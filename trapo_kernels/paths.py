"""This file has the ways in which values of tokens and policy losses are computed, and says which of them a call takes.

                     one pass                    two passes (tokens coupled, or logits given)
    streamed         autograd.StreamedLoss       autograd.StreamedLogprobs, then terms.py by autograd
    compiled         ops.policy_loss             ops.token_values, then the same
    materialised     –                           reference.py, then the same

A compiled graph has a path of its own, ops.py, because without a compiler it costs memory and time. An operator may
not give its outputs away, so the gradients are copied where the streamed loss hands the very tensors over; and its
call, through torch.library and its autograd, costs about a millisecond. Measured (bench/two_paths.py, AMD EPYC,
AVX-512, 1 thread, best of calls in turns, machine shared, 2026-11-30): a loss of 768 tokens, D = 576, V = 49152, takes
1.53 s and 39 MB by the function of autograd, 1.63 s and 114 MB by the operator; one of 64 tokens, D = 64, V = 2048,
2.6 ms and 4.0 ms.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .arguments import validate
from .arguments.graph import tracing
from .arguments.temperatures import of_tokens
from .autograd import Ask, Deposit, Job, StreamedLogprobs, StreamedLoss, apply
from .backends.base import stats_dtype
from .batch import Batch, PolicyLoss, active_tokens, make_batch
from .call import Call, Named, Params, in_one_dtype, wanted
from .chunks.selection import Selection
from .divergence import heads, linear_divergence
from .head import Head
from .reference import TokenValues
from .statistics import Collector

__all__ = [
    "batch_of_logprobs",
    "facts_of_loss",
    "from_values",
    "over_parts",
    "policy_loss",
    "select",
    "token_values",
    "two_passes",
    "values_of_targets",
]


def select(active: Tensor) -> tuple[Selection, Tensor | None]:
    """Returns (the `active` tokens [N]; None). For a compiler (every token; `active`)."""
    if tracing():
        return Selection.every(active), active
    return Selection.choose(active), None


def token_values(
    caller: str,
    call: Call,
    selection: Selection,
    targets: Tensor,
    *,
    entropy: bool = False,
    target_logits: bool = False,
    statistics: tuple[str, ...] = (),
    active: Tensor | None = None,
) -> TokenValues:
    """Returns what is asked for of the compact rows [n]; all but the statistics differentiable. With `active`, for a
    compiler: of all rows [N], zero where not active."""
    if isinstance(call.kernel, Named):
        assert active is not None
        return ops.run_token_values(call, call.kernel, active, targets, entropy, statistics)
    if active is not None:
        return _materialise_dense(call, active, targets, entropy, statistics)
    if call.kernel is None:
        first = selection.counting(selection.take(call.first))
        return reference.token_values(_logits(call, first), targets, call.head, statistics)
    job = Job(call.kernel, call.head, selection, targets, wanted(call.params), into=call.weight_grad)
    extras = Collector(statistics, selection.size, call.stats_dtype, call.first.device)
    logprobs, entropies, target = apply(
        StreamedLogprobs, caller, job, Ask(entropy, target_logits, extras), *call.params
    )
    return TokenValues(logprobs, entropies, target, extras.values)


def values_of_targets(caller: str, call: Call, targets: Tensor, **asked: Any) -> tuple[Selection, TokenValues]:
    """Returns (which tokens take part, what is asked for of them) of targets [...] that nobody has looked at yet.

    asked: entropy and statistics, as `token_values`. Raises ValueError for a target out of range.
    """
    flat, active = active_tokens(targets, call.head, None)
    validate.check_range(caller, flat, active, call.vocab, call.head.ignore_index)
    selection, dense = select(active)
    compact = selection.counting(selection.take(flat))
    return selection, token_values(caller, call, selection, compact, active=dense, **asked)


def _logits(call: Call, first: Tensor) -> Tensor:
    """Returns all logits of these hidden states; or these logits."""
    if len(call.params) == 1:
        return first
    _, weight, bias = in_one_dtype(call.params)
    assert weight is not None
    return reference.linear_logits(first, weight, bias)


def _materialise_dense(
    call: Call, active: Tensor, targets: Tensor, entropy: bool, statistics: tuple[str, ...]
) -> TokenValues:
    logits = _logits(call, torch.where(active[:, None], call.first, 0))
    values = reference.token_values(logits, torch.where(active, targets, 0), call.head, statistics)
    logprobs, entropies, target = (torch.where(active, t, 0) for t in values[:3])  # type: ignore[arg-type]
    found = {name: torch.where(active, values.statistics[name], 0) for name in statistics}
    return TokenValues(logprobs, entropies if entropy else None, target, found)


def policy_loss(caller: str, call: Call, batch: Batch, ref: Params, tolerance: float) -> PolicyLoss:
    """Computes the loss of a linear head; with the divergence from a reference head where the objective has one."""
    left_out = torch.zeros((), dtype=torch.float32, device=call.first.device) if tolerance else None
    if call.kernel is None or batch.objective.coupled:
        out = two_passes(caller, _depositing(call) if call.kernel is None else call, batch, left_out)
    elif isinstance(call.kernel, Named):
        loss, values = ops.run_policy_loss(call, call.kernel, batch)
        out = batch.result(loss, values, batch.parts(values), left_out)
    else:
        into, wants = call.weight_grad, wanted(call.params)
        batch = replace(batch, divided=into is not None)
        job = Job(call.kernel, call.head, batch.selection, batch.targets, wants, tolerance, into)
        found: list[PolicyLoss] = []
        loss = apply(StreamedLoss, caller, job, batch, left_out, found, *call.params)
        out = found[-1]._replace(loss=loss)
    return _add_anchor(out, _depositing(call), batch, ref) if batch.objective.reference_head else out


def _depositing(call: Call) -> Call:
    """Returns the call with a weight whose gradient autograd adds to `weight_grad`."""
    if call.weight_grad is None:
        return call
    hidden, weight, bias = call.params
    return replace(call, params=(hidden, Deposit.apply(weight, call.weight_grad), bias))


def facts_of_loss(
    caller: str,
    group: Any,
    made: tuple[Call, Batch, float],
    targets: Tensor,
    of_batch: dict[str, Any],
    ref: tuple[Any, Any, Any],
    temperature: Any,
) -> dict[str, Any]:
    """Returns what the ranks of a group must have in common; without one, {}, and the reference is checked."""
    call, batch, tolerance = made
    if group is not None:
        settings = of_batch["skip_inactive"], tolerance, call.weight_grad is None
        inputs = {**of_batch["floats"], **of_batch["masks"], "sequence_ids": of_batch["sequence_ids"]}
        return call.facts(
            targets, settings=settings, temperatures=of_tokens(temperature), **batch.facts(caller, inputs)
        )
    reads = batch.objective.reference_head
    validate.check_reference(caller, validate.under_autocast(*ref), targets, reads, call.columns)
    if reads and of_tokens(temperature) is not None:
        raise ValueError(f"{caller}: temperature must be a number for expert='asft'; got one per token")
    return {}


def over_parts(caller: str, call: Call, targets: Tensor, mask: Tensor | None, group: Any, sizes: list[int]) -> Call:
    """Returns the call over all ranks' parts of the vocabulary, in which the targets have to be."""
    flat, active = active_tokens(targets, call.head, mask)
    validate.check_range(caller, flat, active, sum(sizes), call.head.ignore_index)
    return call.sharded(group, sizes)


def two_passes(caller: str, call: Call, batch: Batch, left_out: Tensor | None = None) -> PolicyLoss:
    """Computes log-probabilities first, then the objective on vectors, by autograd."""
    values = token_values(
        caller, call, batch.selection, batch.targets, entropy=True, target_logits=batch.objective.reads_logit,
        statistics=batch.statistics, active=None if batch.dense is None else batch.dense.active,
    )  # fmt: skip
    return from_values(batch, values, left_out)


def from_values(batch: Batch, values: TokenValues, left_out: Tensor | None = None) -> PolicyLoss:
    """Computes the objective on vectors, by autograd."""
    parts = batch.parts(values)
    loss = batch.loss(parts)
    if values.logprobs.requires_grad and not loss.requires_grad:  # no part has a weight: a gradient of zeros
        loss = loss + torch.where(torch.ones_like(batch.expert), 0, values.logprobs).sum()
    return batch.result(loss, values, {name: part.detach() for name, part in parts.items()}, left_out)


def batch_of_logprobs(
    caller: str,
    logprobs: Any,
    objective: Any,
    entropy: Any,
    *,
    floats: dict[str, Tensor | None],
    masks: dict[str, Tensor | None],
    divisors: dict[str, float | Tensor | None],
    sequence_ids: Tensor | None = None,
    skip_inactive: bool = False,
) -> tuple[Batch, TokenValues]:
    """Makes the batch of a loss from log-probabilities [...], and their values in it [n]; entropies of None are 0.

    Raises:
        TypeError, ValueError: an argument is wrong; one line names it.
    """
    validate.check_logprobs(caller, logprobs, entropy)
    batch = make_batch(
        caller, objective, torch.zeros_like(logprobs, dtype=torch.int64), Head(), vocab=None,
        dtype=stats_dtype(logprobs.dtype), skip_inactive=skip_inactive, divisors=divisors, floats=floats,
        masks=masks, sequence_ids=sequence_ids, statistics=(), like="logprobs",
    )  # fmt: skip
    validate.check_reads_logprobs(caller, objective, entropy)

    def rows(values: Tensor) -> Tensor:
        wide = values.reshape(-1).to(batch.normalizer.dtype)
        if batch.dense is not None:
            return torch.where(batch.dense.active, wide, 0)
        return batch.selection.counting(batch.selection.take(wide))

    found = rows(logprobs)
    return batch, TokenValues(found, torch.zeros_like(found) if entropy is None else rows(entropy), None, {})


def _add_anchor(out: PolicyLoss, call: Call, batch: Batch, ref: Params) -> PolicyLoss:
    """Returns the loss with the divergence of its expert tokens from a reference added."""
    o, head = batch.objective, call.head
    weights = batch.expert.to(batch.normalizer.dtype) * (o.expert_coef * o.asft_kl)
    weights = weights if batch.weights is None else weights * batch.weights
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = call.params, ref
    assert hidden is not None
    assert weight is not None
    assert ref_hidden is not None
    assert ref_weight is not None
    ref_hidden, selection = ref_hidden.reshape(-1, ref_hidden.shape[-1]), batch.selection.front()
    if selection is not None:
        weights = selection.counting(weights[: selection.size])
        anchor = heads.anchor(
            "linear_policy_loss", selection, weights, batch.normalizer, head, call.params,
            (ref_hidden, ref_weight, ref_bias), streamed=call.kernel is not None,
        )  # fmt: skip
    else:
        weights = batch.selection.spread(weights)
        anchor = linear_divergence(
            hidden, weight, ref_hidden, ref_weight, mask=weights != 0, weights=weights, normalizer=batch.normalizer,
            bias=bias, ref_bias=ref_bias, temperature=head.temperature, softcap=head.softcap,
            logit_scale=head.logit_scale, backend="reference" if call.kernel is None else "torch",
        ).loss  # fmt: skip
    more: dict[str, Any] = {name: out.metrics[name] + anchor.detach() for name in ("loss", "loss_expert")}
    return out._replace(loss=out.loss + anchor, metrics={**out.metrics, **more})
