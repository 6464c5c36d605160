"""A divergence is computed from a teacher that is known on K ids a token, as an engine's top-k log-probabilities are:
to distil without the teacher's logits, and without the student's. topk_terms.py has the formulas.

The gradients are made in the forward: three GEMMs, 2·N·D·V FLOPs each. A renormalised one needs the logits of the ids
alone (gathered.py), where K is well below V.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import validate
from ..arguments.scalars import filled, number, shown
from ..autograd import apply
from ..backends.base import RowKernel, stats_dtype
from ..call import Named, wanted
from ..chunks.selection import Selection
from . import ops
from .autograd import StreamedSupportLoss, SupportLoss, make_job
from .logprobs import Supported, SupportLogprobs, materialize, prepare, restricted_logprobs
from .topk_terms import KINDS, TAILS, Teacher

__all__ = ["TopkDivergence", "linear_topk_divergence"]


class TopkDivergence(NamedTuple):
    """Holds a loss (scalar, fp32; fp64 for fp64 inputs); detached, of each token [...] and zero at masked ones, its
    divergence in nats, and the log-mass that the student has outside of the ids (None for tail="renormalise")."""

    loss: Tensor
    tokens: Tensor
    tail: Tensor | None


def linear_topk_divergence(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    kind: str = "forward_kl",
    tail: str = "bucket",
    beta: float = 0.5,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
    group: Any = None,
) -> TopkDivergence:
    """Computes Σ weights · D(student, teacher) / normalizer over tokens, for a teacher that is known on K ids of each.

    Gradients are exact, computed in the forward and handed over in the backward, as by `linear_policy_loss`: three
    GEMMs in all, and never the `[tokens, vocab]` logits.

    Args:
        hidden, weight, bias, temperature, softcap, logit_scale, backend, group: the student's, as `linear_logprobs`.
        ids: [..., K] int64 in [0, V), or -1 for none; where an id stands twice in a token, the first place counts.
        teacher_logprobs: [..., K] of the teacher at the ids, nats, over its whole vocabulary; −inf: impossible. A
            constant.
        kind: "forward_kl" = KL(teacher ‖ student), "reverse_kl" = KL(student ‖ teacher), "jsd", or "mixed" = beta ·
            forward_kl + (1 − beta) · reverse_kl.
        tail: "bucket": the classes beside the ids are one more class, of the mass that is left to them; "drop": they
            are left out of the sum; "renormalise": both distributions are those over the ids alone. In a reverse KL the
            teacher's bucket has at least 1e-7.
        beta: weight of the teacher in the mixture of "jsd", and of the forward KL in "mixed"; in (0, 1).
        mask: [...] bool, None = all tokens; others cost nothing and give 0.
        weights: [...] of the tokens, constants; None = 1.
        normalizer: a number above 0 or 0-dim tensor (where 0 counts as 1), a constant; None = the number of tokens in
            the mask, or 1.

    Raises:
        TypeError, ValueError: one line naming the argument, what it accepts and what it got. Values of ids are checked
            on the CPU; elsewhere one out of range makes its token, and with it the loss, NaN.

    Example:
        >>> hidden, weight = torch.tensor([[1.0, 0.0]], requires_grad=True), torch.eye(3, 2)
        >>> teacher = torch.tensor([[0.5, 0.25]]).log()        # of ids 0 and 1; the other 0.25 is the tail
        >>> out = linear_topk_divergence(hidden, weight, torch.tensor([[0, 1]]), teacher)
        >>> out.loss.backward()
        >>> round(out.loss.item(), 4)
        0.0117
    """
    caller = "linear_topk_divergence"
    beta = _check_choices(caller, kind, tail, beta)
    options = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    settings = (kind, tail, beta, weights is None, number(normalizer))
    inputs = {"ref_logprobs": teacher_logprobs, "advantages and policy_weights": weights}
    on = prepare(caller, hidden, weight, ids, bias, mask, backend, group, settings, inputs, **options)
    validate.check_of_ids(caller, "teacher_logprobs", teacher_logprobs, ids)
    dtype, shape, tokens_like = stats_dtype(on.call.first.dtype), ids.shape[:-1], ids.sum(-1)
    given = validate.check_token_inputs(caller, tokens_like, {"weights": weights}, {}, "hidden")[0]["weights"]
    of_tokens = torch.ones_like(on.active, dtype=dtype) if given is None else given.reshape(-1).to(dtype)
    if normalizer is None:
        scale = filled(on.active.sum().clamp(min=1), dtype, on.active.device)
    else:
        scale = validate.divisor(caller, "normalizer", normalizer, dtype, on.active.device)
    wrong = None if on.wrong is None else on.wrong.any(1) & on.active
    if wrong is not None:
        of_tokens = of_tokens.masked_fill(wrong, torch.nan)
    logprobs = teacher_logprobs.detach().reshape(on.ids.shape)
    teacher = Teacher.of(kind, tail, beta, logprobs, on.ids, on.vocab)
    loss, tokens, left = _loss(caller, on, teacher, of_tokens, scale)
    tokens = tokens.detach() if wrong is None else tokens.detach().masked_fill(wrong, torch.nan)
    return TopkDivergence(loss, tokens.reshape(shape), None if left is None else left.detach().reshape(shape))


def _check_choices(caller: str, kind: Any, tail: Any, beta: Any) -> float:
    """Returns beta as a number."""
    for name, value, choices in (("kind", kind, KINDS), ("tail", tail, TAILS)):
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{caller}: {name} must be one of {', '.join(map(repr, choices))}; got {shown(value)}")
    found = number(beta)
    if found is None or not 0 < found < 1:
        raise ValueError(f"{caller}: beta must be a number in (0, 1); got {shown(beta)}")
    return found


def _loss(
    caller: str, on: Supported, teacher: Teacher, weights: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns (the loss; of all rows [N] the divergences and the log-mass of the tail, zero where not active)."""
    call = on.call
    if call.kernel is None or teacher.tail == "renormalise":
        if call.kernel is None:
            found = materialize(on, teacher.tail == "renormalise")
        else:
            found = restricted_logprobs(caller, on)
        return _by_autograd(on, teacher, weights, scale, found)
    if isinstance(call.kernel, Named):
        total, tokens, left = ops.run_topk(call, call.kernel, on.ids, on.active, teacher, weights)
        return total / scale, tokens, left
    assert isinstance(call.kernel, RowKernel)
    selection = Selection.choose(on.active, weights != 0)
    job, mine = make_job(call.kernel, call.head, selection, on.ids, wanted(call.params))
    of_rows = selection.counting(selection.take(weights))
    loss = SupportLoss(teacher.map(selection.take).of_values, of_rows)
    total, tokens, left = apply(StreamedSupportLoss, caller, job, mine, loss, scale, *call.params)
    return total, selection.spread(tokens), selection.spread(left)


def _by_autograd(
    on: Supported, teacher: Teacher, weights: Tensor, scale: Tensor, found: SupportLogprobs
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Computes it from log-probabilities that have a gradient of their own."""
    counted = on.active & (weights != 0)
    logprobs = torch.where(counted[:, None], found.logprobs, found.logprobs.detach())
    tail = None if found.tail is None else torch.where(counted, found.tail, found.tail.detach())
    tokens = teacher.divergence(logprobs, tail).masked_fill(~on.active, 0)
    total = (weights * tokens.masked_fill(weights == 0, 0)).sum() / scale
    left = None if teacher.tail == "renormalise" or tail is None else tail.masked_fill(~on.active, 0)
    return total, tokens, left
