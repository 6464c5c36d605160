"""This file computes divergences over the whole vocabulary between two heads, a student π and a frozen reference p,
without either's `[tokens, vocab]` logits: for distillation, and for ASFT's anchor.

    forward_kl   KL(p ‖ π) = Σ p (log p − log π)                         dD/dz = π − p
    reverse_kl   KL(π ‖ p) = Σ π (log π − log p)                         dD/dz_j = π_j (log π_j − log p_j − D)
    jsd          β KL(p ‖ M) + (1−β) KL(π ‖ M), M = β p + (1−β) π        dD/dz_j = (1−β) π_j (a_j − Σ π a), a = log π/M
    mixed        β KL(p ‖ π) + (1−β) KL(π ‖ p)                           the sum of theirs

One stream over chunks of rows: the student's logits and the reference's (a GEMM each), value and gradient in place of
the student's logits, then the GEMMs of the gradients: 4 in all, 2·N·D·V FLOPs each; one more for each further
reference, whose gradients are summed in a third buffer. The budget holds the buffers and the scratch of a block of rows
(rows.py). Logits are fp32 where the heads are of 16 bits: a divergence is a difference of two distributions,
in which their rounding would be large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from ..arguments import validate
from ..arguments.scalars import filled, number, shown
from ..arguments.temperatures import into_hidden
from ..autograd import apply, check_backward, finish_all
from ..backends.base import RowKernel, stats_dtype
from ..call import Named, Params, in_one_dtype, pick_kernel, wanted
from ..chunks.budget import chunk_rows
from ..chunks.buffers import logits_buffer
from ..chunks.selection import Selection
from ..chunks.sources import LinearSource, LogitsSource, Source
from ..head import Head
from .references import References, as_lists, at_temperatures, check_reference, frozen, references, shares_of
from .rows import KINDS, Rows, scratch_bytes

__all__ = ["KINDS", "Divergence", "Job", "anchor", "linear_divergence", "run", "weighted_sum"]


class Divergence(NamedTuple):
    """Holds a loss (scalar, fp32; fp64 for fp64 inputs), and the detached divergence of each token [...] in nats, zero
    at masked ones."""

    loss: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Job:
    """Holds what the stream has to know beside the parameters."""

    kind: str
    beta: float
    head: Head
    ref_head: Head
    selection: Selection
    weights: Tensor  # compact [n], of the tokens' divergences
    normalizer: Tensor
    wants: tuple[bool, bool, bool]
    shares: tuple[float, ...] = (1.0,)  # of the references


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | Sequence[Tensor] | None = None,
    ref_weight: Tensor | Sequence[Tensor] | None = None,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | Sequence[Tensor | None] | None = None,
    ref_logits: Tensor | None = None,
    ref_shares: Sequence[float] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_options: Mapping[str, float | None] | None = None,
    backend: str | None = None,
) -> Divergence:
    """Returns Σ weights · D(student, reference) / normalizer over tokens, with exact gradients of hidden, weight and
    bias.

    The reference is frozen: no gradient flows into its tensors. Gradients are computed in the forward and handed over
    in the backward, as by `linear_policy_loss`.

    Args:
        hidden, weight, bias: the student's, [..., D], [V, D] and [V] or None, of one floating dtype.
        ref_hidden, ref_weight, ref_bias: the reference's, [..., D'], [V, D'] and [V] or None: of another width or
            dtype if you like, over the same vocabulary. Lists of them: several references in one pass over the
            student's logits, whose divergences are added up.
        kind: "forward_kl" = KL(reference ‖ student), "reverse_kl" = KL(student ‖ reference), "jsd", or "mixed" = beta ·
            forward_kl + (1 − beta) · reverse_kl.
        beta: weight of the reference in the mixture of "jsd", and of the forward KL in "mixed"; in (0, 1).
        mask: [...] bool, None = all tokens; others cost nothing and give 0.
        weights: [...] of the tokens, constants; None = 1.
        normalizer: a number above 0 or 0-dim tensor (where 0 counts as 1), a constant; None = the number of tokens in
            the mask, or 1.
        temperature, softcap, logit_scale: of both heads. A temperature of each token as in `linear_logprobs`; not of
            ref_logits, which can be divided before.
        ref_logits: [..., V] of a reference that has no head here, in place of ref_hidden and ref_weight:
            log-probabilities do as well. The head's options apply to them; see ref_options.
        ref_shares: the weight of each of several references, at least 0; None = the same for all, 1 in sum.
        ref_options: those of the three that are different for the reference.
        backend: "torch" (streamed), "reference" (materialises both); None = streamed.

    Raises:
        TypeError, ValueError: one line naming the argument, what it accepts and what it got.

    Example:
        >>> hidden, weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True), torch.eye(3, 2)
        >>> out = linear_divergence(hidden, weight, ref_hidden=torch.zeros(2, 2), ref_weight=weight)
        >>> out.loss.backward()                                # KL(uniform ‖ student), a mean over two tokens
        >>> round(out.loss.item(), 4)
        0.2969
    """
    caller = "linear_divergence"
    others = {} if ref_options is None else ref_options
    hidden, left = into_hidden(caller, hidden, temperature, bias, softcap)
    options = {"temperature": left, "softcap": softcap, "logit_scale": logit_scale}
    head = validate.check_head(caller, **options)
    hidden, weight, bias = validate.under_autocast(hidden, weight, bias)
    refs = references(caller, ref_hidden, ref_weight, ref_bias, ref_logits)
    if not isinstance(others, Mapping) or not set(others) <= set(options):
        raise TypeError(f"{caller}: ref_options must map some of {', '.join(options)} to numbers; got {shown(others)}")
    of_refs: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale, **others}
    refs, of_refs["temperature"] = at_temperatures(caller, refs, of_refs["temperature"], of_refs["softcap"])
    ref_head = validate.check_head(f"{caller}: ref_options", **of_refs)
    beta, shares = _check_beta(caller, beta), shares_of(caller, ref_shares, len(refs))
    _check(caller, (hidden, weight, bias), refs, kind)
    shape = hidden.shape[:-1]
    floats, masks = validate.check_token_inputs(caller, hidden[..., 0], {"weights": weights}, {"mask": mask}, "hidden")
    kernel = _kernel(caller, backend, hidden.device)
    active, of_tokens = _counted(hidden, masks["mask"], floats["weights"])
    params, refs = (hidden.reshape(-1, hidden.shape[-1]), weight, bias), frozen(refs)
    wants = wanted(params)
    if normalizer is None:
        scale = filled(active.sum().clamp(min=1), of_tokens.dtype, hidden.device)
    else:
        scale = validate.divisor(caller, "normalizer", normalizer, of_tokens.dtype, hidden.device)
    if isinstance(kernel, Named):
        total, tokens, *_ = torch.ops.trapo_kernels.divergence(
            *params, *as_lists(refs), active, of_tokens, kind, beta, list(shares), *head.options, *ref_head.options,
            *wants,
        )  # fmt: skip
        return Divergence(total / scale, tokens.reshape(shape))
    selection = Selection.choose(active, of_tokens != 0)
    of_rows = selection.counting(selection.take(of_tokens))
    job = Job(kind, beta, head, ref_head, selection, of_rows, scale, (wants[0], wants[1], wants[2]), shares)
    loss, tokens = _run(caller, job, refs, params, kernel is not None)
    return Divergence(loss, selection.spread(tokens.detach()).reshape(shape))


def anchor(
    caller: str,
    selection: Selection,
    weights: Tensor,
    normalizer: Tensor,
    head: Head,
    params: Any,
    ref: Any,
    streamed: bool,
) -> Tensor:
    """Returns Σ weights · KL(reference ‖ student) / normalizer over rows that are chosen, with compact weights [n]."""
    params = validate.under_autocast(*params)
    refs = (validate.one_dtype(*ref),)
    _check(caller, params, refs, "forward_kl")
    wants = wanted(params)
    job = Job("forward_kl", 0.5, head, head, selection, weights, normalizer, (wants[0], wants[1], wants[2]))
    return _run(caller, job, frozen(refs), params, streamed)[0]


def _run(caller: str, job: Job, refs: References, params: Params, streamed: bool) -> tuple[Tensor, Tensor]:
    """Returns (the loss, the divergence of each token [n])."""
    found: tuple[Tensor, Tensor] = (
        apply(_StreamedDivergence, caller, job, refs, *params) if streamed else _materialise(job, refs, *params)
    )
    return found


def _counted(hidden: Tensor, mask: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (which tokens take part [N], their weights [N])."""
    dtype, shape = stats_dtype(hidden.dtype), hidden.shape[:-1]
    active = hidden.new_ones(shape.numel(), dtype=torch.bool) if mask is None else mask.reshape(-1)
    of_tokens = hidden.new_ones(shape.numel(), dtype=dtype) if weights is None else weights.reshape(-1).to(dtype)
    return active, of_tokens


def _check_beta(caller: str, beta: Any) -> float:
    found = number(beta)
    if found is None or not 0 < found < 1:
        raise ValueError(f"{caller}: beta must be a number in (0, 1); got {shown(beta)}")
    return found


def _kernel(caller: str, backend: str | None, device: torch.device) -> RowKernel | Named | None:
    """Returns the kernel of the call's backend, which only says how it is computed; None: materialised."""
    if backend is not None and not (isinstance(backend, str) and backend in ("torch", "reference")):
        raise ValueError(f"{caller}: backend must be 'torch', 'reference' or None; got {shown(backend)}")
    return pick_kernel(backend, caller, device)[1]


def _check(caller: str, student: tuple[Any, Any, Any], refs: References, kind: Any) -> None:
    validate.check_linear(caller, *student)
    hidden, weight, _ = student
    for ref in refs:
        check_reference(caller, ref, hidden, weight.shape[0])
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{caller}: kind must be one of {', '.join(map(repr, KINDS))}; got {shown(kind)}")


# The oracle --------------------------------------------------------------------------------------------------


def _materialise(job: Job, refs: References, *params: Any) -> tuple[Tensor, Tensor]:
    def log_softmax(head: Head, *given: Any) -> Tensor:
        first = job.selection.counting(job.selection.take(given[0]))
        wide = torch.promote_types(stats_dtype(first.dtype), job.weights.dtype)
        z = first.to(wide) if len(given) == 1 else reference.linear_logits(first, *given[1:])
        z = z * head.scale
        return F.log_softmax(z if head.cap is None else head.cap * torch.tanh(z / head.cap), -1)

    log_pi = log_softmax(job.head, *in_one_dtype(params))
    # A token without weight has no gradient, where its divergence is infinite either.
    log_pi = torch.where((job.weights != 0)[:, None], log_pi, log_pi.detach())
    found = [_of_two(job, log_softmax(job.ref_head, *ref).to(job.weights.dtype), log_pi) for ref in refs]
    tokens = sum(
        (share * each for share, each in zip(job.shares[1:], found[1:], strict=True)), job.shares[0] * found[0]
    )
    return weighted_sum(job.weights, tokens) / job.normalizer, tokens


def _of_two(job: Job, log_p: Tensor, log_pi: Tensor) -> Tensor:
    """Returns the divergence of each row [n]."""
    if job.kind == "forward_kl":
        return _kl(log_p, log_pi)
    if job.kind == "reverse_kl":
        return _kl(log_pi, log_p)
    if job.kind == "mixed":
        return job.beta * _kl(log_p, log_pi) + (1 - job.beta) * _kl(log_pi, log_p)
    none = (log_p == -torch.inf) & (log_pi == -torch.inf)  # where the derivative of logaddexp is none
    either = [t.masked_fill(none, 0) for t in (log_p, log_pi)]
    log_m = torch.logaddexp(either[0] + math.log(job.beta), either[1] + math.log(1 - job.beta))
    return job.beta * _kl(log_p, log_m) + (1 - job.beta) * _kl(log_pi, log_m)


def weighted_sum(weights: Tensor, tokens: Tensor) -> Tensor:
    """Returns Σ weights · tokens, to which a token without weight adds nothing, not even one that is infinite."""
    return (weights * tokens.masked_fill(weights == 0, 0)).sum()


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Returns Σ a (log a − log b); a class with a = 0 gives 0, and nothing to the gradient."""
    none = log_a == -torch.inf
    return (log_a.exp() * (log_a.masked_fill(none, 0) - log_b.masked_fill(none, 0))).sum(-1)


# The stream --------------------------------------------------------------------------------------------------


class _StreamedDivergence(torch.autograd.Function):
    """Computes loss and gradients in one pass over the logits; the backward hands the gradients over."""

    @staticmethod
    def forward(ctx: Any, job: Job, refs: References, *params: Any) -> tuple[Tensor, Tensor]:
        tokens, ctx.grads = run(job, refs, params)
        ctx.job, ctx.params, ctx.sizes = job, len(params), [len(ref) for ref in refs]
        ctx.save_for_backward(*params, *(t for ref in refs for t in ref))
        ctx.mark_non_differentiable(tokens)
        ctx.set_materialize_grads(False)
        return weighted_sum(job.weights, tokens) / job.normalizer, tokens

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, _: Any) -> tuple[Any, ...]:
        check_backward("linear_divergence", g_loss)
        if g_loss is None:
            return (None,) * (2 + ctx.params)
        saved = ctx.saved_tensors  # once: inside a checkpoint they can be unpacked no second time
        params, others = saved[: ctx.params], list(saved[ctx.params :])
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # a second backward through a retained graph
            refs = tuple(tuple(others.pop(0) for _ in range(size)) for size in ctx.sizes)
            _, grads = run(ctx.job, refs, params)
        return None, None, *finish_all(grads, params, g_loss / ctx.job.normalizer)


def run(job: Job, refs: References, params: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Returns divergences of the compact rows [n], and the gradients of their weighted sum."""
    hidden, weight, bias = in_one_dtype(params)
    assert hidden is not None
    assert weight is not None
    selection, counting = job.selection, job.selection.counting
    source = LinearSource(counting(hidden), weight, bias, job.head, selection, wants=job.wants, wide_chunks=True)
    others = [_source(job, ref) for ref in refs]
    size, middle = selection.size, selection.with_gradient if any(job.wants) else 0
    tokens = torch.empty(size, dtype=job.weights.dtype, device=source.device)
    step = _chunk(job, source, others)
    mine = logits_buffer(step, source.vocab, source.dtype, source.device)
    theirs = {dtype: logits_buffer(step, source.vocab, dtype, source.device) for dtype in {o.dtype for o in others}}
    total = logits_buffer(step, source.vocab, source.dtype, source.device) if len(others) > 1 else mine
    for start, stop in ((0, middle), (middle, size)):
        for first in range(start, stop, step):
            at = slice(first, min(first + step, stop))
            count = at.stop - first
            x, into = source.logits(at, mine[:count]), total[:count] if stop <= middle else None
            rows = Rows(job.kind, job.beta, job.head.cap, job.ref_head.cap, job.weights[at] * job.head.scale)
            for i, (other, share) in enumerate(zip(others, job.shares, strict=True)):
                r = other.logits(at, theirs[other.dtype][:count])
                if selection.inside is not None:
                    r.masked_fill_(~selection.inside[at, None], 0)
                rows.add(x, r, tokens[at], share, into, first=i == 0)
            if into is not None:
                source.put(at, into)
    return tokens, source.gradients()


def _source(job: Job, ref: Params) -> Source:
    """Returns where logits of a reference come from."""
    counting = job.selection.counting
    if len(ref) == 1:
        assert ref[0] is not None
        return LogitsSource(ref[0], job.ref_head, job.selection)
    hidden, weight, bias = ref
    assert hidden is not None
    assert weight is not None
    return LinearSource(counting(hidden), weight, bias, job.ref_head, job.selection, wide_chunks=True)


def _chunk(job: Job, source: LinearSource, others: list[Source]) -> int:
    wide = stats_dtype(source.dtype).itemsize
    scratch = scratch_bytes(source.vocab, wide, source.device) + source.extra_bytes
    row_bytes = source.row_bytes * (1 + (len(others) > 1)) + sum({o.dtype: o.row_bytes for o in others}.values())
    longest = max(job.selection.size, 1)
    return min(longest, chunk_rows(longest, row_bytes, scratch, source.device.type))
