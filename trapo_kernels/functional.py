"""What users call: check the arguments, leave out the rows that need no work, pick a backend, connect autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import columns, reference, stream, validate
from .dispatch import pick
from .head import Head
from .metrics import policy_metrics
from .objective import Objective, Tokens
from .rows.base import RowInputs, RowKernel, RowStats, stats_dtype
from .stream import LinearSource, LogitsSource, Rows, Source

__all__ = [
    "PolicyLoss",
    "TokenLogprobs",
    "linear_logprobs",
    "linear_policy_loss",
    "logprobs_from_logits",
    "policy_loss_from_logits",
]


class TokenLogprobs(NamedTuple):
    """Log-probabilities of the targets [...] and entropies [...] (None where not asked for), in nats, fp32 (fp64 for
    fp64 inputs). Zero at ignored tokens."""

    logprobs: Tensor
    entropy: Tensor | None


class PolicyLoss(NamedTuple):
    """A loss (scalar, fp32; fp64 for fp64 inputs), its metrics (METRICS has the names), and the detached
    log-probabilities and entropies [...] it was computed from, zero at tokens that were left out."""

    loss: Tensor
    metrics: dict[str, Tensor]
    logprobs: Tensor
    entropy: Tensor


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    backend: str | None = None,
    group: Any = None,
) -> TokenLogprobs:
    """Log-probabilities (and entropies) of targets under a linear head, without the `[tokens, vocab]` logits.

    One GEMM forward; the backward recomputes the logits chunk by chunk (three GEMMs), and skips tokens whose incoming
    gradient is zero. Both outputs are differentiable once in hidden, weight and bias.

    Args:
        hidden: [..., D] float16, bfloat16, float32 or float64.
        weight: [V, D], of hidden's dtype and device.
        targets: [...] int64 in [0, V), or ignore_index: 0 and no gradient there.
        bias: [V], of hidden's dtype and device.
        temperature, softcap, logit_scale: z = softcap · tanh(logit_scale · (h Wᵀ + b) / softcap) / temperature.
        entropy: also return the entropy of each token's distribution.
        backend: "torch", "reference", ...; None = the fastest here. See `backends()`.
        group: reserved for vocabulary-parallel heads.

    Raises:
        TypeError, ValueError: one line naming the argument, what it accepts and what it got. Values of targets are
            checked on the CPU; on an accelerator one out of range trips the device's index assertion.
    """
    caller = "linear_logprobs"
    validate.check_group(caller, group)
    head = validate.check_head(
        caller, temperature=temperature, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index
    )
    validate.check_linear(caller, hidden, weight, bias)
    validate.check_targets(caller, targets, "hidden", hidden)
    kernel = pick(backend, caller, hidden.device).kernel
    params = (hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    return _logprobs(caller, params, targets, head, kernel, entropy)


def logprobs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    backend: str | None = None,
) -> TokenLogprobs:
    """`linear_logprobs` for logits [..., V] that exist already. Beside their gradient nothing of their size is made.

    Raises:
        TypeError, ValueError: as `linear_logprobs`.
    """
    caller = "logprobs_from_logits"
    head = validate.check_head(
        caller, temperature=temperature, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index
    )
    validate.check_logits(caller, logits)
    validate.check_targets(caller, targets, "logits", logits)
    kernel = pick(backend, caller, logits.device).kernel
    return _logprobs(caller, (logits.reshape(-1, logits.shape[-1]),), targets, head, kernel, entropy)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: Objective,
    *,
    advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    expert_mask: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    skip_inactive: bool = False,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
    group: Any = None,
) -> PolicyLoss:
    """The loss of `objective` over a linear head, without the `[tokens, vocab]` logits: three GEMMs in all.

    The gradients are computed in the forward and handed over in the backward, scaled by what comes in; a second
    backward through the same graph (retain_graph) recomputes them. Frozen parameters and `no_grad` cost less.

    A token is active where `mask` is True and its target is not ignore_index; others cost nothing and give 0. Active
    tokens that can have no gradient (A = 0 without entropy or KL term) cost the first GEMM alone.

    Args:
        hidden: [..., D] float16, bfloat16, float32 or float64.
        weight: [V, D], of hidden's dtype and device.
        targets: [...] int64 in [0, V), or ignore_index.
        objective: the terms; see `Objective`, also for which of the next four it needs.
        advantages: [...], or one per sequence (the shape of targets without its last dimension, or with 1 there).
        old_logprobs: [...] of the policy that the ratio is taken to; None = this policy: r = 1, with its gradient.
        ref_logprobs: [...] of the KL term's reference.
        rollout_logprobs: [...] as the sampling engine computed them, for tis_cap.
        expert_mask: [...] bool: True = expert-prefix token (expert term), False = own token (policy term). None: all
            own; all expert where the objective has an expert term and no policy term.
        mask: [...] bool, None = all.
        normalizer: the sum of token losses is divided by this number (above 0) or 0-dim tensor; None = the number of
            active tokens, or 1. Across micro-batches and ranks pass one global number, and sum.
        skip_inactive: leave active tokens without gradient out of everything but the count.
        bias, temperature, softcap, logit_scale, ignore_index, backend, group: as `linear_logprobs`.

    Advantages and the given logprobs are constants: no gradient flows into them.

    Raises:
        TypeError, ValueError: as `linear_logprobs`.
    """
    caller = "linear_policy_loss"
    validate.check_group(caller, group)
    head = validate.check_head(
        caller, temperature=temperature, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index
    )
    validate.check_linear(caller, hidden, weight, bias)
    validate.check_targets(caller, targets, "hidden", hidden)
    batch = _batch(
        caller, objective, targets, weight.shape[0], stats_dtype(hidden.dtype), head, skip_inactive, normalizer,
        {"advantages": advantages, "old_logprobs": old_logprobs,
         "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs},
        {"expert_mask": expert_mask, "mask": mask},
    )  # fmt: skip
    kernel = pick(backend, caller, hidden.device).kernel
    params = (hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    if kernel is None:
        return _two_pass(params, batch, head, kernel)
    job = _Job(kernel, head, batch.rows, batch.targets, _wanted(params))
    loss, logprobs, entropy = _PolicyLoss.apply(job, batch, *params)
    return batch.result(loss, logprobs, entropy)


def policy_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    objective: Objective,
    *,
    advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    expert_mask: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    skip_inactive: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> PolicyLoss:
    """`linear_policy_loss` for logits [..., V] that exist already. Beside their gradient nothing of their size is made.

    Raises:
        TypeError, ValueError: as `linear_logprobs`.
    """
    caller = "policy_loss_from_logits"
    head = validate.check_head(
        caller, temperature=temperature, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index
    )
    validate.check_logits(caller, logits)
    validate.check_targets(caller, targets, "logits", logits)
    batch = _batch(
        caller, objective, targets, logits.shape[-1], stats_dtype(logits.dtype), head, skip_inactive, normalizer,
        {"advantages": advantages, "old_logprobs": old_logprobs,
         "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs},
        {"expert_mask": expert_mask, "mask": mask},
    )  # fmt: skip
    kernel = pick(backend, caller, logits.device).kernel
    return _two_pass((logits.reshape(-1, logits.shape[-1]),), batch, head, kernel)


# Log-probabilities -------------------------------------------------------------------------------------------

# (hidden [N, D], weight [V, D], bias [V] or None), or (logits [N, V],)
_Params = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class _Job:
    """One call of the stream: everything but the tensors that have a gradient."""

    kernel: RowKernel
    head: Head
    rows: Rows
    targets: Tensor  # compact
    wants: tuple[bool, ...]  # which params

    def source(self, params: _Params, rows: Rows, wants: tuple[bool, ...]) -> Source:
        if len(params) == 1:
            (logits,) = params
            assert logits is not None
            return LogitsSource(logits, self.head, rows, wants[0])
        hidden, weight, bias = params
        assert hidden is not None
        assert weight is not None
        # Zero times what a caller padded with would be NaN in d_weight.
        hidden = rows.counting(hidden)
        return LinearSource(hidden, weight, bias, self.head, rows, (wants[0], wants[1], wants[2]))

    def forward_only(self, params: _Params, entropy: bool) -> RowStats:
        """Statistics of the rows, by the kernel that writes no logits where there is one for these parameters."""
        tiles = getattr(self.kernel, "linear_stats", None)
        if tiles is not None and len(params) == 3:
            hidden, weight, bias = params
            assert hidden is not None
            hidden = self.rows.counting(self.rows.take(hidden))
            found: RowStats | None = tiles(hidden, weight, bias, self.targets, self.head, entropy)
            if found is not None:
                return found
        source = self.source(params, self.rows, (False,) * len(params))
        return stream.forward(source, self.kernel, self.rows, self.targets, self.head, entropy)

    def by_columns(self, params: _Params, rows: Rows) -> bool:
        """Whether to recompute over blocks of the vocabulary rather than over chunks of rows."""
        if len(params) != 3 or not getattr(self.kernel, "BY_COLUMNS", False):
            return False
        hidden, weight, _ = params
        assert hidden is not None
        assert weight is not None
        return columns.pays(rows.size, weight.shape[0], hidden.dtype.itemsize, hidden.device.type)


def _wanted(params: _Params) -> tuple[bool, ...]:
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in params)


def _finished(grads: tuple[Tensor | None, ...], params: _Params, scale: Tensor | None) -> tuple[Tensor | None, ...]:
    """Accumulated gradients, scaled in the accumulator's precision, in the dtypes of the parameters. In place where the
    dtype is right, so that autograd can keep the very tensor as `.grad`."""

    def finish(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
        if grad is None or like is None:
            return None
        if scale is not None:
            grad = grad.to(stats_dtype(grad.dtype)).mul_(scale)
        return grad.to(like.dtype)

    return tuple(finish(grad, like) for grad, like in zip(grads, params, strict=True))


def _refuse_second_derivative(caller: str) -> None:
    # Grad mode is on inside a backward under create_graph=True alone. Going on would give zero for a second derivative.
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{caller}: create_graph must be False, a streamed loss has no second derivative; use backend='reference'"
        )


class _TokenLogprobs(torch.autograd.Function):
    """Statistics in one pass; the backward recomputes the logits of rows that have an incoming gradient."""

    @staticmethod
    def forward(ctx: Any, job: _Job, entropy: bool, *params: Tensor | None) -> tuple[Tensor, Tensor | None]:
        stats = job.forward_only(params, entropy)
        ctx.job, ctx.params = job, len(params)
        ctx.save_for_backward(*params, *stats)
        ctx.set_materialize_grads(False)
        return stats.logprobs, stats.entropy

    @staticmethod
    def backward(ctx: Any, g_lp: Tensor | None, g_entropy: Tensor | None) -> tuple[Any, ...]:
        _refuse_second_derivative("linear_logprobs")
        job, saved = ctx.job, ctx.saved_tensors
        params, stats = saved[: ctx.params], RowStats(*saved[ctx.params :])
        if g_lp is None:
            g_lp = torch.zeros_like(stats.logprobs)
        live = g_lp != 0 if g_entropy is None else (g_lp != 0) | (g_entropy != 0)
        rows, kept = job.rows.narrow(live)
        g_lp, g_entropy = kept.take(g_lp), None if g_entropy is None else kept.take(g_entropy)
        g_lp, g_entropy = rows.counting(g_lp), None if g_entropy is None else rows.counting(g_entropy)
        stats = stats.map(lambda t: rows.counting(kept.take(t)))
        if job.by_columns(params, rows):
            hidden, weight, bias = params
            hidden = rows.counting(hidden)
            recompute = columns.Recompute(
                job.kernel, job.head, rows.take(hidden), weight, bias, kept.take(job.targets),
                stats, g_lp, g_entropy,
            )  # fmt: skip
            d_hidden, *others = recompute.gradients(job.wants)
            grads = (None if d_hidden is None else rows.spread(d_hidden), *others)
            return None, None, *_finished(grads, params, None)
        source = job.source(params, rows, job.wants)
        stream.backward(
            source, job.kernel, rows, kept.take(job.targets), job.head,
            stats,
            lambda at, _: (g_lp[at], None if g_entropy is None else g_entropy[at]),
        )  # fmt: skip
        return None, None, *_finished(source.gradients(), params, None)


def _token_logprobs(
    params: _Params, rows: Rows, targets: Tensor, head: Head, kernel: RowKernel | None, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """(logprobs, entropy) of the compact rows [n], differentiable."""
    if kernel is not None:
        job = _Job(kernel, head, rows, targets, _wanted(params))
        out: tuple[Tensor, Tensor | None] = _TokenLogprobs.apply(job, entropy, *params)
        return out
    first = rows.take(params[0])  # type: ignore[arg-type]
    logits = first if len(params) == 1 else reference.linear_logits(first, *params[1:])  # type: ignore[arg-type]
    return reference.token_logprobs(logits, targets, head)


def _logprobs(
    caller: str, params: _Params, targets: Tensor, head: Head, kernel: RowKernel | None, entropy: bool
) -> TokenLogprobs:
    flat = targets.reshape(-1)
    active = flat != head.ignore_index
    vocab = params[1].shape[0] if len(params) > 1 else params[0].shape[1]  # type: ignore[union-attr]
    validate.check_range(caller, flat, active, vocab, head.ignore_index)
    rows = Rows.choose(active)
    logprobs, entropies = _token_logprobs(params, rows, rows.counting(rows.take(flat)), head, kernel, entropy)
    shape = targets.shape
    return TokenLogprobs(
        rows.spread(logprobs).reshape(shape),
        rows.spread(entropies).reshape(shape) if entropy and entropies is not None else None,
    )


# Policy losses -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """The tokens of a policy loss: which rows take part, and their per-token inputs, compact [n]."""

    objective: Objective
    rows: Rows
    targets: Tensor
    expert: Tensor
    inputs: dict[str, Tensor | None]
    normalizer: Tensor
    counts: dict[str, Tensor]
    shape: torch.Size

    def tokens(self, logprobs: Tensor, entropy: Tensor, at: slice = slice(None)) -> Tokens:
        inputs = {name: None if t is None else t[at] for name, t in self.inputs.items()}
        return Tokens(logprobs, entropy, self.expert[at], **inputs)

    def slopes(self, at: slice, stats: RowStats) -> tuple[Tensor, Tensor | None]:
        assert stats.entropy is not None
        g_lp, g_entropy = self.objective.slopes(self.tokens(stats.logprobs, stats.entropy, at))
        if self.rows.inside is not None:
            outside = ~self.rows.inside[at]
            g_lp = g_lp.masked_fill(outside, 0)
            g_entropy = None if g_entropy is None else g_entropy.masked_fill(outside, 0)
        return g_lp, g_entropy

    def fused(self, kernel: RowKernel) -> stream.Fused | None:
        """For kernels that compute the slopes of these terms themselves."""
        verb, terms = getattr(kernel, "fused_", None), self.objective.fused()
        if verb is None or terms is None or self.rows.inside is not None:
            return None
        if self.normalizer.dtype == torch.float64 and not getattr(kernel, "FUSED_FLOAT64", True):
            return None
        return stream.Fused(verb, terms, RowInputs(self.expert, **self.inputs))

    def parts(self, tokens: Tokens) -> dict[str, Tensor]:
        """`Objective.losses` of the tokens that count."""
        return {name: self.rows.counting(values) for name, values in self.objective.losses(tokens).items()}

    def losses(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(the loss, its weighted parts per token)."""
        parts = self.parts(self.tokens(logprobs, entropy))
        total = sum(parts.values(), torch.zeros_like(logprobs))
        return total.sum() / self.normalizer, parts

    def result(self, loss: Tensor, logprobs: Tensor, entropy: Tensor) -> PolicyLoss:
        with torch.no_grad():
            logprobs, entropy = logprobs.detach(), entropy.detach()
            tokens = self.tokens(logprobs, entropy)
            parts = self.parts(tokens)
            metrics = policy_metrics(self.objective, tokens, parts, self.normalizer, self.counts, self.rows.inside)
        spread = self.rows.spread
        return PolicyLoss(loss, metrics, spread(logprobs).reshape(self.shape), spread(entropy).reshape(self.shape))


def _batch(
    caller: str,
    objective: Any,
    targets: Tensor,
    vocab: int,
    dtype: torch.dtype,
    head: Head,
    skip_inactive: bool,
    normalizer: float | Tensor | None,
    floats: dict[str, Tensor | None],
    masks: dict[str, Tensor | None],
) -> _Batch:
    if not isinstance(objective, Objective):
        raise TypeError(f"{caller}: objective must be an Objective; got {type(objective).__name__}")
    floats, masks = validate.check_token_inputs(caller, targets, floats, masks)
    for name, setting in objective.needs.items():
        if floats[name] is None:
            raise ValueError(f"{caller}: {name} must be a tensor, which {setting} needs; got None")
    flat = targets.reshape(-1)
    active = flat != head.ignore_index
    if masks["mask"] is not None:
        active = active & masks["mask"].reshape(-1)
    validate.check_range(caller, flat, active, vocab, head.ignore_index)
    if masks["expert_mask"] is None:
        expert = torch.full_like(active, objective.supervised)
    else:
        expert = masks["expert_mask"].reshape(-1)
    advantages = floats["advantages"]
    live = objective.has_gradient(expert, None if advantages is None else advantages.reshape(-1))
    rows = Rows.choose(active, live, drop_others=skip_inactive)
    count = active.sum()
    if normalizer is None:
        normalizer = count.clamp(min=1)
    else:
        validate.check_normalizer(caller, normalizer)
    return _Batch(
        objective=objective,
        rows=rows,
        targets=rows.counting(rows.take(flat)),
        expert=rows.take(expert),
        inputs={n: None if t is None else rows.take(t.reshape(-1)).to(dtype) for n, t in floats.items()},
        normalizer=_scalar(normalizer, dtype, flat.device),
        counts={"tokens": count, "zero_gradient_tokens": (active & ~live).sum()},
        shape=targets.shape,
    )


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0-dim; a number is filled in on the device, since copying it there would wait for the stream."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


class _PolicyLoss(torch.autograd.Function):
    """Loss and gradients in one pass over the logits; the backward hands the gradients over."""

    @staticmethod
    def forward(ctx: Any, job: _Job, batch: _Batch, *params: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        stats, ctx.grads = _PolicyLoss.run(job, batch, params)
        assert stats.entropy is not None
        loss, _ = batch.losses(stats.logprobs, stats.entropy)
        ctx.job, ctx.batch = job, batch
        ctx.save_for_backward(*params)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats.logprobs, stats.entropy)
        return loss, stats.logprobs, stats.entropy

    @staticmethod
    def run(job: _Job, batch: _Batch, params: _Params) -> tuple[RowStats, tuple[Tensor | None, ...]]:
        if not any(job.wants):
            return job.forward_only(params, entropy=True), (None,) * len(params)
        source = job.source(params, job.rows, job.wants)
        slopes, fused = batch.slopes, batch.fused(job.kernel)
        stats = stream.forward(source, job.kernel, job.rows, job.targets, job.head, True, slopes, fused)
        return stats, source.gradients()

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        _refuse_second_derivative("linear_policy_loss")
        params = ctx.saved_tensors
        if g_loss is None:
            return (None,) * (2 + len(params))
        # The first backward gives its gradients away (they are scaled in place, and become `.grad`); a second one
        # through a retained graph makes its own.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, grads = _PolicyLoss.run(ctx.job, ctx.batch, params)
        return None, None, *_finished(grads, params, g_loss / ctx.batch.normalizer)


def _two_pass(params: _Params, batch: _Batch, head: Head, kernel: RowKernel | None) -> PolicyLoss:
    """Log-probabilities first, then the objective on vectors, by autograd."""
    logprobs, entropy = _token_logprobs(params, batch.rows, batch.targets, head, kernel, entropy=True)
    assert entropy is not None
    loss, _ = batch.losses(logprobs, entropy)
    return batch.result(loss, logprobs, entropy)
