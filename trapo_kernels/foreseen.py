"""This file computes log-probabilities of a trainer that makes its loss of them itself, with the gradients of the loss
that it will make.

    forward     values of tokens, and the gradients of the loss that is foreseen, in one pass: three products
    backward    incoming slopes = c · the foreseen ones, for one number c: the gradients are handed over, times c;
                anything else: they are recomputed, which is three products more

A trainer's loss is often known before it is computed: a sum of −log p, or a clipped ratio times an advantage. What
divides it, and by what a gradient scaler multiplies it, need not be: that is c. The comparison reads two vectors of the
tokens and waits for a device once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import validate
from .arguments.temperatures import into_hidden
from .autograd import Ask, Job, StreamedLogprobs, apply, check_backward, finish_all, run_loss
from .backends.base import RowKernel, RowStats
from .batch import Batch, make_batch
from .call import Call, Params, call_of_linear, wanted
from .objective import Objective
from .paths import values_of_targets
from .statistics import Collector, check_statistics
from .tokens import Slopes

__all__ = ["Foreseen", "TokenOutputs", "token_outputs"]

FLOATS = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs", "policy_weights")
MASKS = ("expert_mask",)


@dataclass(frozen=True)
class Foreseen:
    """Is the loss that the log-probabilities go into, but for a factor: the sum of `objective` over the tokens.

    Args:
        objective: reads log-probabilities, entropies and statistics of a token, not of its whole sequence.
        inputs: of `linear_policy_loss`, by their names there [...]; it has no mask: every token counts.
        missed: called in a backward whose slopes were other ones.
    """

    objective: Objective
    inputs: Mapping[str, Tensor | None] = field(default_factory=dict)
    missed: Callable[[], None] = lambda: None


class TokenOutputs(NamedTuple):
    """Holds log-probabilities and entropies [...] (differentiable; None where not asked for) and statistics [...] of
    tokens, in fp32 (fp64 for fp64 inputs); zero at ignored tokens."""

    logprobs: Tensor
    entropy: Tensor | None
    statistics: dict[str, Tensor]


def token_outputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    entropy: bool = False,
    statistics: Sequence[str] = (),
    foreseen: Foreseen | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> TokenOutputs:
    """Computes log-probabilities, entropies and statistics of targets under a linear head, in one pass.

    Args:
        statistics: names; statistics.py says what each is.
        foreseen: the loss that they will go into; None: the backward recomputes the logits.
        hidden, weight, targets, entropy, bias, temperature, softcap, logit_scale, ignore_index, backend: as
            `linear_logprobs`.

    Raises:
        TypeError, ValueError: as `linear_logprobs`.
    """
    caller = "token_outputs"
    hidden, left = into_hidden(caller, hidden, temperature, bias, softcap)
    head = validate.check_head(
        caller, temperature=left, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index
    )
    call = call_of_linear(caller, head, hidden, weight, bias, targets, backend)
    names, shape = check_statistics(caller, statistics), targets.shape
    if foreseen is not None and any(wanted(call.params)) and isinstance(call.kernel, RowKernel):
        batch = _batch(caller, call, targets, foreseen, names)
        job = Job(call.kernel, head, batch.selection, batch.targets, wanted(call.params))
        logprobs, entropies, *found = apply(_ForeseenLogprobs, caller, job, batch, foreseen, *call.params)
        spread, of_names = batch.selection.spread, dict(zip(batch.statistics, found, strict=True))
    else:
        selection, (logprobs, entropies, _, of_names) = values_of_targets(
            caller, call, targets, entropy=entropy, statistics=names
        )
        spread = selection.spread
    return TokenOutputs(
        spread(logprobs).reshape(shape),
        spread(entropies).reshape(shape) if entropy and entropies is not None else None,
        {name: spread(of_names[name]).reshape(shape) for name in names},
    )


def _batch(caller: str, call: Call, targets: Tensor, foreseen: Foreseen, statistics: tuple[str, ...]) -> Batch:
    objective, inputs = foreseen.objective, dict(foreseen.inputs)
    if objective.coupled or objective.reads_logit or objective.reference_head:
        raise ValueError(f"{caller}: foreseen must be of an objective that reads tokens one by one; got {objective}")
    floats, masks = ({name: inputs.pop(name, None) for name in names} for names in (FLOATS, MASKS))
    if inputs:
        raise TypeError(f"{caller}: foreseen.inputs must be among {', '.join(FLOATS + MASKS)}; got {', '.join(inputs)}")
    return make_batch(
        caller, objective, targets, call.head, vocab=call.columns, dtype=call.stats_dtype, skip_inactive=False,
        divisors={"normalizer": 1.0, "expert_normalizer": None}, floats=floats, masks={**masks, "mask": None},
        sequence_ids=None, statistics=statistics,
    )  # fmt: skip


class _ForeseenLogprobs(torch.autograd.Function):
    """Computes values of tokens and the gradients of the foreseen loss in one pass."""

    @staticmethod
    def forward(ctx: Any, job: Job, batch: Batch, foreseen: Foreseen, *params: Tensor | None) -> tuple[Tensor, ...]:
        values, ctx.grads, *_ = run_loss(job, batch, params)
        logprobs, entropy, *statistics = values
        ctx.expected = _slopes(batch, logprobs, entropy, statistics)
        ctx.job, ctx.missed = job, foreseen.missed
        ctx.save_for_backward(*params)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*statistics)
        return logprobs, entropy, *statistics

    @staticmethod
    def backward(ctx: Any, g_lp: Tensor | None, g_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        check_backward("token_outputs", g_lp, g_entropy)
        params: Params = ctx.saved_tensors
        if g_lp is None and g_entropy is None:
            return (None,) * (3 + len(params))
        # They are given away by the first backward, as in autograd.py.
        grads, ctx.grads = ctx.grads, None
        factor = None if grads is None else _common_factor(ctx.expected, g_lp, g_entropy)
        if factor is not None:
            return None, None, None, *finish_all(grads, params, factor)
        if grads is not None:
            ctx.missed()
        del grads
        return None, None, None, *_recomputed(ctx.job, params, g_lp, g_entropy)


def _slopes(batch: Batch, logprobs: Tensor, entropy: Tensor, statistics: Sequence[Tensor]) -> Slopes:
    """Returns the slopes of the foreseen loss of all rows, whose values these are."""
    extras, none = Collector((), 0, logprobs.dtype, logprobs.device), torch.zeros_like(logprobs)
    extras.values = dict(zip(batch.statistics, statistics, strict=True))
    return batch.slopes(slice(None), RowStats(logprobs, none, none, entropy), extras)


def _common_factor(expected: Slopes, g_lp: Tensor | None, g_entropy: Tensor | None) -> Tensor | None:
    """Returns the number (0-dim) that the expected slopes were multiplied by to give these; None: there is none."""
    wanted = [e for e in (expected.logprobs, expected.entropy) if e is not None]
    zero = torch.zeros_like(wanted[0])
    slopes = torch.cat([zero if e is None else e for e in (expected.logprobs, expected.entropy)])
    incoming = torch.cat([zero if g is None else g.to(zero.dtype) for g in (g_lp, g_entropy)])
    if slopes.numel() == 0:
        return slopes.new_ones(())
    largest = slopes.abs().argmax()
    factor = torch.where(slopes[largest] == 0, 1, incoming[largest] / slopes[largest])
    scaled = slopes * factor
    eps = torch.finfo(zero.dtype).eps  # of 1: both sides are a handful of operations on the same log-probabilities
    same = (incoming - scaled).abs() <= 64 * eps * scaled.abs() + eps * scaled[largest].abs()
    return factor if bool(same.all()) else None


def _recomputed(job: Job, params: Params, g_lp: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Returns gradients of the parameters for these slopes, from their logits once more."""
    with torch.enable_grad():
        again = [
            None if p is None else p.detach().requires_grad_(w) for p, w in zip(params, job.wants, strict=True)
        ]  # fmt: skip
        logprobs, entropy, _ = StreamedLogprobs.apply(job, Ask(entropy=g_entropy is not None), *again)
    given = [(out, g) for out, g in ((logprobs, g_lp), (entropy, g_entropy)) if g is not None]
    outputs, slopes = zip(*given, strict=True)
    trained = [p for p in again if p is not None and p.requires_grad]
    found = iter(torch.autograd.grad(outputs, trained, slopes, allow_unused=True))
    return tuple(next(found) if p is not None and p.requires_grad else None for p in again)
