"""This file computes divergences over the whole vocabulary between two heads, a student π and a frozen reference p,
without either's `[tokens, vocab]` logits: for distillation, and for ASFT's anchor.

    forward_kl   KL(p ‖ π) = Σ p (log p − log π)                         dD/dz = π − p
    reverse_kl   KL(π ‖ p) = Σ π (log π − log p)                         dD/dz_j = π_j (log π_j − log p_j − D)
    jsd          β KL(p ‖ M) + (1−β) KL(π ‖ M), M = β p + (1−β) π        dD/dz_j = (1−β) π_j (a_j − Σ π a), a = log π/M

One stream over chunks of rows: the student's logits and the reference's (a GEMM each), value and gradient in place of
the student's logits, then the GEMMs of the gradients: 4 in all, 2·N·D·V FLOPs each. The budget holds both buffers and
the scratch of a block of rows (4 times [block, V], and a mask). Logits are fp32 where the heads are of 16 bits: a
divergence is a difference of two distributions, in which their rounding would be large.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference, validate
from .autograd import apply, check_backward, finish_all
from .backends.base import stats_dtype
from .backends.dispatch import backend_name, pick
from .budget import chunk_rows
from .buffers import block_rows, logits_buffer
from .call import Params, wanted
from .head import Head
from .scalars import filled, number, shown
from .selection import Selection
from .sources import LinearSource

__all__ = ["KINDS", "Divergence", "Job", "anchor", "linear_divergence", "run", "weighted_sum"]

KINDS = ("forward_kl", "reverse_kl", "jsd")


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


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
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
            dtype if you like, over the same vocabulary.
        kind: "forward_kl" = KL(reference ‖ student), "reverse_kl" = KL(student ‖ reference), "jsd".
        beta: weight of the reference in the mixture of "jsd", in (0, 1).
        mask: [...] bool, None = all tokens; others cost nothing and give 0.
        weights: [...] of the tokens, constants; None = 1.
        normalizer: a number above 0 or 0-dim tensor (where 0 counts as 1), a constant; None = the number of tokens in
            the mask, or 1.
        temperature, softcap, logit_scale: of both heads.
        ref_options: those of the three that are different for the reference.
        backend: "torch" (streamed), "reference" (materialises both); None = streamed.

    Raises:
        TypeError, ValueError: one line naming the argument, what it accepts and what it got.
    """
    caller = "linear_divergence"
    options = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    head = validate.check_head(caller, **options)
    hidden, weight, bias = validate.one_dtype(hidden, weight, bias)
    ref_hidden, ref_weight, ref_bias = validate.one_dtype(ref_hidden, ref_weight, ref_bias)
    others = {} if ref_options is None else ref_options
    if not isinstance(others, Mapping) or not set(others) <= set(options):
        raise TypeError(f"{caller}: ref_options must map some of {', '.join(options)} to numbers; got {shown(others)}")
    ref_head = validate.check_head(f"{caller}: ref_options", **{**options, **others})
    beta = _check_beta(caller, beta)
    _check(caller, (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias), kind)
    shape = hidden.shape[:-1]
    floats, masks = validate.check_token_inputs(caller, hidden[..., 0], {"weights": weights}, {"mask": mask}, "hidden")
    streamed = _is_streamed(caller, backend, hidden.device)
    dtype = stats_dtype(hidden.dtype)
    given, active = floats["weights"], hidden.new_ones(shape.numel(), dtype=torch.bool)
    if masks["mask"] is not None:
        active = masks["mask"].reshape(-1)
    of_tokens = hidden.new_ones(shape.numel(), dtype=dtype) if given is None else given.reshape(-1).to(dtype)
    params = (hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    ref = (ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]), ref_weight.detach(), _detach(ref_bias))
    wants = wanted(params)
    if normalizer is None:
        scale = filled(active.sum().clamp(min=1), dtype, hidden.device)
    else:
        scale = validate.divisor(caller, "normalizer", normalizer, dtype, hidden.device)
    if streamed and torch.compiler.is_compiling():
        total, tokens, *_ = torch.ops.trapo_kernels.divergence(
            *params, *ref, active, of_tokens, kind, beta, *head.options, *ref_head.options, *wants
        )
        return Divergence(total / scale, tokens.reshape(shape))
    if torch.compiler.is_compiling():
        selection = replace(Selection.every(active), inside=active)
    else:
        selection = Selection.choose(active, of_tokens != 0)
    of_rows = selection.counting(selection.take(of_tokens))
    job = Job(kind, beta, head, ref_head, selection, of_rows, scale, (wants[0], wants[1], wants[2]))
    loss, tokens = _run(caller, job, ref, params, streamed)
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
    params = validate.one_dtype(*params)
    ref = ref_hidden, ref_weight, ref_bias = validate.one_dtype(*ref)
    _check(caller, params, ref, "forward_kl")
    ref = (ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]), ref_weight.detach(), _detach(ref_bias))
    wants = wanted(params)
    job = Job("forward_kl", 0.5, head, head, selection, weights, normalizer, (wants[0], wants[1], wants[2]))
    return _run(caller, job, ref, params, streamed)[0]


def _run(caller: str, job: Job, ref: Params, params: Params, streamed: bool) -> tuple[Tensor, Tensor]:
    """Returns (the loss, the divergence of each token [n])."""
    found: tuple[Tensor, Tensor] = (
        apply(_StreamedDivergence, caller, job, ref, *params) if streamed else _materialise(job, ref, *params)
    )
    return found


def _check_beta(caller: str, beta: Any) -> float:
    found = number(beta)
    if found is None or not 0 < found < 1:
        raise ValueError(f"{caller}: beta must be a number in (0, 1); got {shown(beta)}")
    return found


def _detach(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def _is_streamed(caller: str, backend: str | None, device: torch.device) -> bool:
    if backend is not None and not (isinstance(backend, str) and backend in ("torch", "reference")):
        raise ValueError(f"{caller}: backend must be 'torch', 'reference' or None; got {shown(backend)}")
    if torch.compiler.is_compiling():
        return backend == "torch" or backend_name(backend, caller, device) != "reference"
    return backend == "torch" or pick(backend, caller, device).kernel is not None


def _check(caller: str, student: tuple[Any, Any, Any], ref: tuple[Any, Any, Any], kind: Any) -> None:
    validate.check_linear(caller, *student)
    validate.check_linear(caller, *ref, prefix="ref_")
    (hidden, weight, _), (ref_hidden, ref_weight, _) = student, ref
    if ref_weight.shape[0] != weight.shape[0]:
        vocab = weight.shape[0]
        raise ValueError(f"{caller}: ref_weight must have V={vocab} rows as weight; got {ref_weight.shape[0]}")
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        tokens, got = list(hidden.shape[:-1]), list(ref_hidden.shape[:-1])
        raise ValueError(f"{caller}: ref_hidden must be {tokens} tokens as hidden; got {got}")
    if ref_hidden.device != hidden.device:
        raise ValueError(
            f"{caller}: ref_hidden must be on the device of hidden, {hidden.device}; got {ref_hidden.device}"
        )
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{caller}: kind must be one of {', '.join(map(repr, KINDS))}; got {shown(kind)}")


# The oracle --------------------------------------------------------------------------------------------------


def _materialise(job: Job, ref: tuple[Any, ...], *params: Any) -> tuple[Tensor, Tensor]:
    def log_softmax(head: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = reference.linear_logits(job.selection.counting(job.selection.take(hidden)), weight, bias) * head.scale
        return F.log_softmax(z if head.cap is None else head.cap * torch.tanh(z / head.cap), -1)

    log_pi, log_p = log_softmax(job.head, *params), log_softmax(job.ref_head, *ref).to(job.weights.dtype)
    # A token without weight has no gradient, where its divergence is infinite either.
    log_pi = torch.where((job.weights != 0)[:, None], log_pi, log_pi.detach())
    if job.kind == "forward_kl":
        tokens = _kl(log_p, log_pi)
    elif job.kind == "reverse_kl":
        tokens = _kl(log_pi, log_p)
    else:
        none = (log_p == -torch.inf) & (log_pi == -torch.inf)  # where the derivative of logaddexp is none
        either = [t.masked_fill(none, 0) for t in (log_p, log_pi)]
        log_m = torch.logaddexp(either[0] + math.log(job.beta), either[1] + math.log(1 - job.beta))
        tokens = job.beta * _kl(log_p, log_m) + (1 - job.beta) * _kl(log_pi, log_m)
    return weighted_sum(job.weights, tokens) / job.normalizer, tokens


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
    def forward(ctx: Any, job: Job, ref: tuple[Any, ...], *params: Any) -> tuple[Tensor, Tensor]:
        tokens, ctx.grads = run(job, ref, params)
        ctx.job, ctx.ref = job, len(params)
        ctx.save_for_backward(*params, *ref)
        ctx.mark_non_differentiable(tokens)
        ctx.set_materialize_grads(False)
        return weighted_sum(job.weights, tokens) / job.normalizer, tokens

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, _: Any) -> tuple[Any, ...]:
        check_backward("linear_divergence", g_loss)
        if g_loss is None:
            return (None,) * (2 + ctx.ref)
        saved = ctx.saved_tensors  # once: inside a checkpoint they can be unpacked no second time
        params, ref = saved[: ctx.ref], saved[ctx.ref :]
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # a second backward through a retained graph
            _, grads = run(ctx.job, ref, params)
        return None, None, *finish_all(grads, params, g_loss / ctx.job.normalizer)


def run(job: Job, ref: Any, params: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Returns divergences of the compact rows [n], and the gradients of their weighted sum."""
    hidden, weight, bias = params
    selection, counting = job.selection, job.selection.counting
    source = LinearSource(counting(hidden), weight, bias, job.head, selection, wants=job.wants, wide_chunks=True)
    hidden, weight, bias = ref
    other = LinearSource(counting(hidden), weight, bias, job.ref_head, selection, wide_chunks=True)
    size, middle = selection.size, selection.with_gradient if any(job.wants) else 0
    tokens = torch.empty(size, dtype=job.weights.dtype, device=source.device)
    step = _chunk(job, source, other)
    mine, theirs = (logits_buffer(step, s.vocab, s.dtype, s.device) for s in (source, other))
    for start, stop in ((0, middle), (middle, size)):
        for first in range(start, stop, step):
            at = slice(first, min(first + step, stop))
            x = source.logits(at, mine[: at.stop - first])
            _divergence_(job, x, other.logits(at, theirs[: at.stop - first]), at, tokens, with_gradient=stop <= middle)
            if stop <= middle:
                source.put(at, x)
    return tokens, source.gradients()


def _chunk(job: Job, source: LinearSource, other: LinearSource) -> int:
    wide = stats_dtype(source.dtype).itemsize
    scratch = block_rows(source.vocab, source.device) * source.vocab * (4 * wide + 2)
    row_bytes = source.row_bytes + other.row_bytes
    longest = max(job.selection.size, 1)
    return min(longest, chunk_rows(longest, row_bytes, scratch + source.extra_bytes, source.device.type))


def _blocks(x: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, four scratch blocks [4, rows, V]) over all rows; the scratch is reused."""
    rows, vocab = x.shape
    step = min(block_rows(vocab, x.device), max(rows, 1))
    scratch = x.new_empty(4, step, vocab, dtype=wide)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield slice(start, stop), scratch[:, : stop - start]


def _log_softmax(x: Tensor, cap: float | None, out: Tensor, spare: Tensor) -> Tensor:
    """Writes log π of a block of logits, before the soft-cap, to `out`."""
    out.copy_(x)
    if cap is not None:
        out.div_(cap).tanh_().mul_(cap)
    out.sub_(out.amax(1, keepdim=True))
    return out.sub_(torch.exp(out, out=spare).sum(1, keepdim=True).log_())


def _divergence_(job: Job, x: Tensor, r: Tensor, at: slice, tokens: Tensor, with_gradient: bool) -> None:
    """Writes the divergences of a chunk into `tokens`; with the gradient, the student's logits x become that of their
    weighted sum."""
    values, weights = tokens[at], job.weights[at] * job.head.scale
    for rows, (log_pi, log_p, a, b) in _blocks(x, tokens.dtype):
        _log_softmax(x[rows], job.head.cap, log_pi, a)
        _log_softmax(r[rows], job.ref_head.cap, log_p, a)
        values[rows] = _KERNELS[job.kind](job.beta, log_pi, log_p, a, b)
        if not with_gradient:
            continue
        a.mul_(weights[rows][:, None])  # dD/dz
        if job.head.cap is not None:  # dz/dx = 1 − tanh²(x / cap)
            a.addcmul_(a, b.copy_(x[rows]).div_(job.head.cap).tanh_().square_(), value=-1)
        x[rows] = a.to(x.dtype)


# Each gives D [block] and leaves dD/dz in `a`. Where a class has no probability, its logarithm of −∞ is masked.


def _forward_kl(beta: float, log_pi: Tensor, log_p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    torch.exp(log_p, out=b)
    torch.sub(log_p, log_pi, out=a).masked_fill_(b == 0, 0).mul_(b)
    value = a.sum(1)
    torch.exp(log_pi, out=a).sub_(b)
    return value


def _reverse_kl(beta: float, log_pi: Tensor, log_p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    torch.exp(log_pi, out=b)
    torch.sub(log_pi, log_p, out=a).masked_fill_(b == 0, 0)
    value = torch.mul(a, b, out=log_p).sum(1)
    a.sub_(value[:, None]).mul_(b)
    return value


def _jsd(beta: float, log_pi: Tensor, log_p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # log π/M = −log(1−β) − log(1 + β/(1−β) · p/π), and log p/M likewise: log π − log M would cancel.
    odds, zero = math.log(beta / (1 - beta)), b.new_zeros(())
    torch.sub(log_p, log_pi, out=b).add_(odds)
    torch.exp(log_p, out=a)
    torch.logaddexp(torch.neg(b, out=log_p), zero, out=log_p).masked_fill_(a == 0, 0)
    of_p = log_p.mul_(a).sum(1)
    torch.exp(log_pi, out=a)
    torch.logaddexp(b, zero, out=b).neg_().masked_fill_(a == 0, 0)  # log π/M + log(1−β)
    mean = torch.mul(a, b, out=log_pi).sum(1)
    a.mul_(b.sub_(mean[:, None])).mul_(1 - beta)
    return (1 - beta) * (mean - math.log(1 - beta)) - beta * (of_p + math.log(beta))


_KERNELS = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}
