"""What users call: check the arguments, leave out the rows that need no work, pick a backend, connect autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import columns, divergence, ops, reference, stream, validate, vocab_parallel
from .agreement import agreed, shards_of
from .backends.base import RowInputs, RowKernel, RowStats, stats_dtype
from .backends.dispatch import backend_name, pick
from .custom_terms import function_name
from .divergence import linear_divergence
from .head import Head
from .metrics import policy_metrics
from .objective import FIELDS, Objective, Tokens
from .reference import TokenValues
from .scalars import filled
from .sources import finished
from .statistics import Collector, check_statistics
from .stream import LinearSource, LogitsSource, Rows, Source
from .tokens import Sequences, Slopes
from .vocab_parallel import ShardedSource

__all__ = [
    "PolicyLoss",
    "TokenLogprobs",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_statistics",
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
        weight: [V, D], of hidden's dtype and device. Inside torch.autocast hidden, weight and bias of different dtypes
            are cast as by F.linear; gradients come back in their own.
        targets: [...] int64 in [0, V), or ignore_index: 0 and no gradient there.
        bias: [V], of hidden's dtype and device.
        temperature, softcap, logit_scale: z = softcap · tanh(logit_scale · (h Wᵀ + b) / softcap) / temperature.
            Numbers; a 0-dim tensor is read, which waits for a device.
        entropy: also return the entropy of each token's distribution.
        backend: "torch", "reference", ...; None = the fastest here. See `backends()`.
        group: a ProcessGroup whose ranks hold the rows of weight (and bias) in order, in parts of any size; hidden and
            targets (ids in the whole vocabulary) are the same on all. A DTensor weight that is Shard(0) brings its
            own. The gradient of hidden is whole on every rank, that of weight is of the part.

    Raises:
        TypeError, ValueError: one line naming the argument, what it accepts and what it got. Values of targets are
            checked on the CPU; on an accelerator one out of range trips the device's index assertion (`torch`) or makes
            its token, and with it the loss, NaN (`triton`, `cuda`).
    """
    caller = "linear_logprobs"
    hidden, weight, bias, group = vocab_parallel.local_parts(caller, hidden, weight, bias, group)

    def prepare() -> tuple[_Call, dict[str, Any]]:
        call = _linear(caller, hidden, weight, bias, targets, backend, group, temperature, softcap, logit_scale,
                       ignore_index)  # fmt: skip
        validate.check_flag(caller, "entropy", entropy)
        return call, {} if group is None else call.facts(targets, entropy)

    if group is None:
        call, _ = prepare()
    else:
        call, sizes = shards_of(caller, group, weight, prepare)
        call = call.sharded(group, sizes)
    return _logprobs(caller, call.params, targets, call.head, call.kernel, entropy)


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
    validate.check_flag(caller, "entropy", entropy)
    _, kernel = _pick(backend, caller, logits.device)
    return _logprobs(caller, (logits.reshape(-1, logits.shape[-1]),), targets, head, kernel, entropy)


@torch.no_grad()
def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Sequence[str],
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> dict[str, Tensor]:
    """Statistics of each token's distribution under a linear head [...], without the `[tokens, vocab]` logits and
    without gradient: "top20_mass", "top20_entropy" (any k), "sum_sq", "argmax_match", "mean_logit". One GEMM.

    Args:
        statistics: names; statistics.py says what each is. Zero at ignored tokens.
        hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, backend: as `linear_logprobs`.

    Raises:
        TypeError, ValueError: as `linear_logprobs`.
    """
    caller = "linear_statistics"
    head = validate.check_head(
        caller, temperature=temperature, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index
    )
    hidden, weight, bias = validate.under_autocast(hidden, weight, bias)
    validate.check_linear(caller, hidden, weight, bias)
    validate.check_targets(caller, targets, "hidden", hidden)
    names = check_statistics(caller, statistics)
    flat = targets.reshape(-1)
    active = flat != ignore_index
    validate.check_range(caller, flat, active, weight.shape[0], ignore_index)
    dense = active if torch.compiler.is_compiling() else None
    rows = Rows.choose(active) if dense is None else Rows.every(active)
    params = (hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    _, kernel = _pick(backend, caller, hidden.device)
    compact = rows.counting(rows.take(flat))
    found = _token_values(caller, params, rows, compact, head, kernel, False, statistics=names, active=dense).statistics
    return {name: rows.spread(values).reshape(targets.shape) for name, values in found.items()}


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
    sequence_ids: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    skip_inactive: bool = False,
    statistics: Sequence[str] = (),
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    grad_tolerance: float = 0.0,
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
        weight: [V, D], of hidden's dtype and device, or float32 beside 16-bit hidden states: it is multiplied in their
            dtype, and its gradient comes from fp32 sums without being rounded.
        targets: [...] int64 in [0, V), or ignore_index.
        objective: the terms; see `Objective`, also for which of the next four it needs.
        advantages: [...], or one per sequence (the shape of targets without its last dimension, or with 1 there).
        old_logprobs: [...] of the policy that the ratio is taken to; None = this policy: r = 1, with its gradient.
        ref_logprobs: [...] of the KL term's reference.
        rollout_logprobs: [...] as the sampling engine computed them, for tis_cap.
        expert_mask: [...] bool: True = expert-prefix token (expert term), False = own token (policy term). None: all
            own; all expert where the objective has an expert term and no policy term.
        mask: [...] bool, None = all. Masks may also be 0 and 1 of an integer dtype.
        sequence_ids: [...] int64: which sequence a token belongs to, for objectives that need to know
            (`Objective.needs_sequences`); None = the last dimension of targets is one. In a sequence, tokens stand in
            order.
        normalizer: the weighted sum of token losses is divided by this number (above 0) or 0-dim tensor (where 0, of a
            batch without a token, counts as 1), a constant; None = what the objective's reduction says (by default the
            number of active tokens), or 1. Across micro-batches and ranks pass one global number, and sum.
        skip_inactive: leave active tokens without gradient out of everything but the count (and of a coupled
            objective's sequences nothing).
        statistics: names of statistics of a row (statistics.py has them) whose means over computed tokens are added to
            the metrics.
        ref_hidden, ref_weight, ref_bias: [..., D'], [V, D'] and [V] of a frozen reference, for expert="asft".
        grad_tolerance: share of the logit gradients' mass Σ|dL/dz| that may be left out where that saves work, in
            [0, 1); 0 = exact. The metric grad_left_out is the share that was. Only backend "cpu" saves any, in fp32;
            the others stay exact.
        bias, temperature, softcap, logit_scale, ignore_index, backend, group: as `linear_logprobs`.

    Advantages and the given logprobs are constants: no gradient flows into them.

    Raises:
        TypeError, ValueError: as `linear_logprobs`.
    """
    caller = "linear_policy_loss"
    hidden, weight, bias, group = vocab_parallel.local_parts(caller, hidden, weight, bias, group)
    floats = {"advantages": advantages, "old_logprobs": old_logprobs,
              "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs}  # fmt: skip
    ref = validate.under_autocast(ref_hidden, ref_weight, ref_bias)

    def prepare() -> tuple[tuple[_Call, _Batch, float], dict[str, Any]]:
        call = _linear(caller, hidden, weight, bias, targets, backend, group, temperature, softcap, logit_scale,
                       ignore_index)  # fmt: skip
        batch = _batch(
            caller, objective, targets, None if group is not None else call.rows_of_weight,
            stats_dtype(call.dtype), call.head, skip_inactive, normalizer, floats,
            {"expert_mask": expert_mask, "mask": mask}, sequence_ids, statistics,
        )  # fmt: skip
        tolerance = validate.check_grad_tolerance(caller, grad_tolerance)
        if group is None:
            validate.check_reference(caller, ref, targets, objective.reference_head, call.rows_of_weight)
            return (call, batch, tolerance), {}
        _check_group(caller, batch)
        given = {**floats, "expert_mask": expert_mask, "mask": mask, "sequence_ids": sequence_ids}
        facts = call.facts(
            targets, objectives=_named(objective), statistics=batch.statistics, settings=(skip_inactive, tolerance),
            normalizer=batch.normalizer, given=sorted(n for n, t in given.items() if t is not None), **given,
        )  # fmt: skip
        return (call, batch, tolerance), facts

    if group is None:
        (call, batch, tolerance), _ = prepare()
    else:
        (call, batch, tolerance), sizes = shards_of(caller, group, weight, prepare)
        call = call.sharded(group, sizes)
        flat, active = _active(targets, call.head, mask)
        validate.check_range(caller, flat, active, sum(sizes), call.head.ignore_index)
    head, kernel, params = call.head, call.kernel, call.params
    if tolerance:
        batch.counts["grad_left_out"] = torch.zeros((), dtype=torch.float32, device=hidden.device)
    if isinstance(kernel, ops.Named):
        return _anchored(_compiled(params, batch, head, kernel), params, ref, batch, head, kernel)
    if kernel is None or batch.objective.coupled:
        return _anchored(_two_pass(caller, params, batch, head, kernel), params, ref, batch, head, kernel)
    job = _Job(kernel, head, batch.rows, batch.targets, _wanted(params), tolerance)
    loss, *values = _applied(_PolicyLoss, caller, job, batch, *params)
    return _anchored(batch.result(loss, batch.values(*values)), params, ref, batch, head, kernel)


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
    sequence_ids: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    skip_inactive: bool = False,
    statistics: Sequence[str] = (),
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
    _, kernel = _pick(backend, caller, logits.device)
    batch = _batch(
        caller, objective, targets, logits.shape[-1], stats_dtype(logits.dtype), head, skip_inactive, normalizer,
        {"advantages": advantages, "old_logprobs": old_logprobs,
         "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs},
        {"expert_mask": expert_mask, "mask": mask}, sequence_ids, statistics,
    )  # fmt: skip
    if objective.reference_head:
        raise ValueError(f"{caller}: objective must not need a reference head; got expert='asft'")
    return _two_pass(caller, (logits.reshape(-1, logits.shape[-1]),), batch, head, kernel)


# Log-probabilities -------------------------------------------------------------------------------------------

# (hidden [N, D], weight [V, D], bias [V] or None), or (logits [N, V],)
_Params = tuple[Tensor | None, ...]


# A row kernel; its name, inside torch.compile; None: materialise.
_Kernel = RowKernel | ops.Named | None


def _pick(backend: str | None, caller: str, device: torch.device) -> tuple[str, _Kernel]:
    """The name of a call's backend, and its kernel."""
    if not torch.compiler.is_compiling():
        found = pick(backend, caller, device)
        return found.name, found.kernel
    name = backend_name(backend, caller, device)
    return name, None if name == "reference" else ops.Named(name)


@dataclass(frozen=True)
class _Call:
    """The linear head of a call, checked: its kernel and what there is a gradient of."""

    head: Head
    backend: str  # its name
    kernel: _Kernel
    params: _Params

    @property
    def dtype(self) -> torch.dtype:
        assert self.params[0] is not None
        return self.params[0].dtype

    @property
    def rows_of_weight(self) -> int:
        assert self.params[1] is not None
        return self.params[1].shape[0]

    def facts(self, targets: Tensor, settings: Any, given: Any = None, **others: Any) -> dict[str, Any]:
        """What the ranks of a group must have in common, by agreement.py's names."""
        hidden, weight, bias = self.params
        assert hidden is not None
        assert weight is not None
        return {
            "the number of tokens": targets.numel(),
            "shapes and dtypes": (targets.shape, hidden.shape, hidden.dtype, weight.shape[1], bias is None),
            "head options": (self.head.options, self.head.ignore_index),
            "backends": self.backend,
            "trained parameters": _wanted(self.params),
            "given inputs": given,
            "targets": targets,
            "settings": settings,
            **others,
        }

    def sharded(self, group: Any, sizes: list[int]) -> _Call:
        """The head of the group of whose weight this rank has a part."""
        shard = vocab_parallel.shard_of(group, sizes)
        if self.kernel is not None:
            assert not isinstance(self.kernel, ops.Named)
            return replace(self, kernel=vocab_parallel.sharded(self.kernel, shard))
        hidden, weight, bias = self.params
        assert weight is not None
        whole = vocab_parallel.gather(weight, shard)
        return replace(self, params=(hidden, whole, None if bias is None else vocab_parallel.gather(bias, shard)))


def _linear(
    caller: str, hidden: Any, weight: Any, bias: Any, targets: Any, backend: str | None, group: Any, *options: Any
) -> _Call:
    """The arguments of a linear head, checked; `options`: temperature, softcap, logit_scale, ignore_index."""
    if group is not None and torch.compiler.is_compiling():
        raise NotImplementedError(f"{caller}: group must be None under torch.compile; got {type(group).__name__}")
    temperature, softcap, logit_scale, ignore_index = options
    head = validate.check_head(
        caller, temperature=temperature, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index
    )
    hidden, weight, bias = validate.under_autocast(hidden, weight, bias)
    validate.check_linear(caller, hidden, weight, bias, sharded=group is not None)
    validate.check_targets(caller, targets, "hidden", hidden)
    name, kernel = _pick(backend, caller, hidden.device)
    return _Call(head, name, kernel, (hidden.reshape(-1, hidden.shape[-1]), weight, bias))


def _named(objective: Objective) -> str:
    """An objective as text that is the same in every process."""
    settings = {name: getattr(objective, name) for name in FIELDS}
    return repr({name: function_name(v) if callable(v) else v for name, v in settings.items()})


def _check_group(caller: str, batch: _Batch) -> None:
    if batch.statistics:
        names = ", ".join(batch.statistics)
        raise NotImplementedError(f"{caller}: group must be None where statistics of a row are read; got {names}")
    if batch.objective.reference_head:
        raise NotImplementedError(f"{caller}: group must be None where a reference head is read; got expert='asft'")


def _vocab(kernel: _Kernel, params: _Params) -> int:
    if isinstance(kernel, RowKernel) and kernel.shard is not None:
        return kernel.shard.vocab
    return params[1].shape[0] if len(params) > 1 else params[0].shape[1]  # type: ignore[union-attr]


@dataclass(frozen=True)
class _Job:
    """One call of the stream: everything but the tensors that have a gradient."""

    kernel: RowKernel
    head: Head
    rows: Rows
    targets: Tensor  # compact
    wants: tuple[bool, ...]  # which params
    tolerance: float = 0.0  # share of the gradient's mass that may be left out

    def source(self, params: _Params, rows: Rows, wants: tuple[bool, ...]) -> Source:
        if len(params) == 1:
            (logits,) = params
            assert logits is not None
            return LogitsSource(logits, self.head, rows, wants[0])
        hidden, weight, bias = _computed(params)
        assert hidden is not None
        assert weight is not None
        # Zero times what a caller padded with would be NaN in d_weight.
        hidden = rows.counting(hidden)
        which = (wants[0], wants[1], wants[2])
        if self.kernel.shard is not None:
            return ShardedSource(self.kernel.shard, hidden, weight, bias, self.head, rows, which)
        source = LinearSource(hidden, weight, bias, self.head, rows, which)
        source.tolerance = self.tolerance
        return source

    def forward_only(self, params: _Params, ask: _Ask) -> RowStats:
        """Statistics of the rows, by the kernel that writes no logits where there is one and nothing else is asked."""
        linear_stats = self.kernel.linear_stats
        if linear_stats is not None and len(params) == 3 and ask.stats_alone:
            hidden, weight, bias = _computed(params)
            assert hidden is not None
            hidden = self.rows.counting(self.rows.take(hidden))
            found = linear_stats(hidden, weight, bias, self.targets, self.head, ask.entropy)
            if found is not None:
                return found
        source = self.source(params, self.rows, (False,) * len(params))
        return stream.forward(source, self.kernel, self.rows, self.targets, self.head, ask.entropy, extras=ask.extras)

    def by_columns(self, params: _Params, rows: Rows) -> bool:
        """Whether to recompute over blocks of the vocabulary rather than over chunks of rows."""
        if len(params) != 3 or not self.kernel.by_columns:
            return False
        hidden, weight, _ = params
        assert hidden is not None
        assert weight is not None
        if hidden.dtype == torch.float16:  # whose factor (sources.py) blocks of columns do not have
            return False
        return columns.pays(rows.size, weight.shape[0], hidden.dtype.itemsize, hidden.device.type)


def _computed(params: _Params) -> _Params:
    """Hidden states, weight and bias in the dtype of the products, that of the hidden states."""
    hidden, *of_head = params
    assert hidden is not None
    return hidden, *(None if t is None else t.to(hidden.dtype) for t in of_head)


def _wanted(params: _Params) -> tuple[bool, ...]:
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in params)


def _finished(grads: tuple[Tensor | None, ...], params: _Params, scale: Tensor | None) -> tuple[Tensor | None, ...]:
    """Accumulated gradients as those of the parameters."""
    return tuple(
        None if grad is None or like is None else finished(grad, like, scale)
        for grad, like in zip(grads, params, strict=True)
    )


def _refuse_second_derivative(caller: str) -> None:
    # Grad mode is on inside a backward under create_graph=True alone. Going on would give zero for a second derivative.
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{caller}: create_graph must be False, a streamed loss has no second derivative; use backend='reference'"
        )


def _applied(function: Any, caller: str, *args: Any) -> Any:
    try:
        return function.apply(*args)
    except RuntimeError as error:
        if "functorch transforms" not in str(error):
            raise
    raise RuntimeError(f"{caller}: a streamed loss is not for torch.func transforms; use backend='reference'")


class _TokenLogprobs(torch.autograd.Function):
    """Statistics in one pass; the backward recomputes the logits of rows that have an incoming gradient."""

    @staticmethod
    def forward(ctx: Any, job: _Job, ask: _Ask, *params: Tensor | None) -> tuple[Tensor | None, ...]:
        stats = job.forward_only(params, ask)
        ctx.job, ctx.params = job, len(params)
        ctx.save_for_backward(*params, *stats)
        ctx.set_materialize_grads(False)
        return stats.logprobs, stats.entropy, stream.target_logits(stats) if ask.target_logits else None

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
        _refuse_second_derivative("linear_logprobs")
        validate.refuse_batched("linear_logprobs", *incoming)
        job, saved = ctx.job, ctx.saved_tensors
        params, stats = saved[: ctx.params], RowStats(*saved[ctx.params :])
        live = torch.zeros_like(stats.logprobs, dtype=torch.bool)
        for g in incoming:
            live = live if g is None else live | (g != 0)
        if job.kernel.shard is not None:
            which = {"gradients": live, "trained parameters": (job.wants, [g is None for g in incoming])}
            agreed("linear_logprobs", job.kernel.shard.group, live.device, which)
        rows, kept = job.rows.narrow(live)
        g_lp, g_entropy, g_logit = (None if g is None else rows.counting(kept.take(g)) for g in incoming)
        stats = rows.counting_stats(stats.map(kept.take))
        if g_logit is None and job.by_columns(params, rows):
            hidden, weight, bias = _computed(params)
            assert weight is not None
            recompute = columns.Recompute(
                job.kernel, job.head, rows.counting(rows.take(hidden)), weight, bias, kept.take(job.targets), stats,
                torch.zeros_like(stats.logprobs) if g_lp is None else g_lp, g_entropy,
            )  # fmt: skip
            d_hidden, *others = recompute.gradients(job.wants)
            grads = (None if d_hidden is None else rows.spread(d_hidden), *others)
            return None, None, *_finished(grads, params, None)
        source = job.source(params, rows, job.wants)
        stream.backward(
            source, job.kernel, rows, kept.take(job.targets), job.head,
            stats,
            lambda at, _: (_at(g_lp, at), _at(g_entropy, at), _at(g_logit, at)),
            by_logit=g_logit is not None,
        )  # fmt: skip
        return None, None, *_finished(source.gradients(), params, None)


def _at(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


@dataclass(frozen=True)
class _Ask:
    """What is wanted of each token beside its log-probability."""

    entropy: bool = False
    target_logits: bool = False
    extras: Collector | None = None

    @property
    def stats_alone(self) -> bool:
        return not self.target_logits and (self.extras is None or not self.extras.values)


def _token_values(
    caller: str,
    params: _Params,
    rows: Rows,
    targets: Tensor,
    head: Head,
    kernel: _Kernel,
    entropy: bool,
    target_logits: bool = False,
    statistics: tuple[str, ...] = (),
    active: Tensor | None = None,
) -> TokenValues:
    """What is asked for of the compact rows [n]; all but the statistics differentiable. With `active`, for a compiler:
    of all rows [N], zero where not active."""
    first = params[0]
    assert first is not None
    if active is not None:
        return _dense_token_values(params, active, targets, head, kernel, entropy, statistics)
    assert not isinstance(kernel, ops.Named)
    if kernel is not None:
        job = _Job(kernel, head, rows, targets, _wanted(params))
        extras = Collector(statistics, rows.size, stats_dtype(first.dtype), first.device)
        ask = _Ask(entropy, target_logits, extras)
        logprobs, entropies, target = _applied(_TokenLogprobs, caller, job, ask, *params)
        return TokenValues(logprobs, entropies, target, extras.values)
    first = rows.counting(rows.take(first))
    logits = first if len(params) == 1 else reference.linear_logits(first, *_computed(params)[1:])  # type: ignore[arg-type]
    return reference.token_values(logits, targets, head, statistics)


def _dense_token_values(
    params: _Params,
    active: Tensor,
    targets: Tensor,
    head: Head,
    kernel: _Kernel,
    entropy: bool,
    statistics: tuple[str, ...],
) -> TokenValues:
    if isinstance(kernel, ops.Named):
        logprobs, entropies, target, _, _, found = torch.ops.trapo_kernels.token_values(
            *ops.three(params), targets, active, entropy, list(statistics), *ops.plain(head, kernel, _wanted(params))
        )
    else:
        first = torch.where(active[:, None], params[0], 0)  # type: ignore[arg-type]
        logits = first if len(params) == 1 else reference.linear_logits(first, *_computed(params)[1:])  # type: ignore[arg-type]
        values = reference.token_values(logits, torch.where(active, targets, 0), head, statistics)
        logprobs, entropies, target = (torch.where(active, t, 0) for t in values[:3])  # type: ignore[arg-type]
        found = [torch.where(active, t, 0) for t in values.statistics.values()]
    by_name = {name: found[i] for i, name in enumerate(statistics)}
    return TokenValues(logprobs, entropies if entropy else None, target, by_name)


def _logprobs(
    caller: str, params: _Params, targets: Tensor, head: Head, kernel: _Kernel, entropy: bool
) -> TokenLogprobs:
    flat = targets.reshape(-1)
    active = flat != head.ignore_index
    validate.check_range(caller, flat, active, _vocab(kernel, params), head.ignore_index)
    dense = active if torch.compiler.is_compiling() else None
    rows = Rows.choose(active) if dense is None else Rows.every(active)
    compact = rows.counting(rows.take(flat))
    logprobs, entropies, _, _ = _token_values(caller, params, rows, compact, head, kernel, entropy, active=dense)
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
    sequences: Sequences | None
    weights: Tensor | None  # of token losses; None: all 1
    statistics: tuple[str, ...]
    normalizer: Tensor
    counts: dict[str, Tensor]
    shape: torch.Size
    # Under torch.compile the rows are all there are, and these say which count; else None.
    own: Tensor | None = None
    active: Tensor | None = None
    live: Tensor | None = None

    def tokens(self, values: TokenValues, at: slice = slice(None)) -> Tokens:
        """Rows `at`, whose values these are."""
        assert values.entropy is not None
        inputs = {name: None if t is None else t[at] for name, t in self.inputs.items()}
        expert, own = self.expert[at], None if self.own is None else self.own[at]
        if self.rows.inside is not None:
            inside = self.rows.inside[at]
            expert, own = expert & inside, ~expert & inside
        return Tokens(
            values.logprobs,
            values.entropy,
            expert,
            **inputs,
            target_logits=values.target_logits,
            statistics=values.statistics,
            sequences=self.sequences,
            own=own,
        )

    def values(self, logprobs: Tensor, entropy: Tensor, *others: Tensor) -> TokenValues:
        """As `flat` gave them."""
        target, found = (others[0], others[1:]) if self.objective.reads_logit else (None, others)
        return TokenValues(logprobs, entropy, target, dict(zip(self.statistics, found, strict=True)))

    def flat(self, stats: RowStats, extras: Collector) -> tuple[Tensor, ...]:
        """The values of all rows, one after the other."""
        assert stats.entropy is not None
        target = [stream.target_logits(stats)] if self.objective.reads_logit else []
        return (stats.logprobs, stats.entropy, *target, *extras.values.values())

    def slopes(self, at: slice, stats: RowStats, extras: Collector) -> Slopes:
        target = stream.target_logits(stats) if self.objective.reads_logit else None
        values = TokenValues(stats.logprobs, stats.entropy, target, extras.at(at))
        slopes = self.objective.all_slopes(self.tokens(values, at))
        if self.weights is None:
            return slopes
        weights = self.weights[at]
        return Slopes(*(None if slope is None else slope * weights for slope in slopes))

    def fused(self, kernel: RowKernel) -> stream.Fused | None:
        """For kernels that compute the slopes of these terms themselves."""
        verb, terms = kernel.fused_, self.objective.fused()
        if verb is None or terms is None or self.statistics:
            return None
        if self.normalizer.dtype == torch.float64 and not kernel.fused_float64:
            return None
        weights = self.weights
        if self.rows.inside is not None:
            inside = self.rows.inside.to(self.normalizer.dtype)
            weights = inside if weights is None else inside * weights
        return stream.Fused(verb, terms, RowInputs(self.expert, **self.inputs, weights=weights))

    def parts(self, values: TokenValues) -> dict[str, Tensor]:
        """The weighted parts of the loss per token [n]."""
        parts = self.objective.losses(self.tokens(values))
        return parts if self.weights is None else {name: part * self.weights for name, part in parts.items()}

    def loss(self, values: TokenValues) -> Tensor:
        total = sum(self.parts(values).values(), torch.zeros_like(values.logprobs))
        return total.sum() / self.normalizer

    def result(self, loss: Tensor, values: TokenValues) -> PolicyLoss:
        with torch.no_grad():
            logprobs, entropy, target, statistics = values
            assert entropy is not None
            logprobs, entropy = logprobs.detach(), entropy.detach()
            values = TokenValues(logprobs, entropy, None if target is None else target.detach(), statistics)
            metrics = policy_metrics(
                self.objective, self.tokens(values), self.parts(values), self.normalizer, self.counts
            )
        spread = self.rows.spread
        return PolicyLoss(loss, metrics, spread(logprobs).reshape(self.shape), spread(entropy).reshape(self.shape))


def _batch(
    caller: str,
    objective: Any,
    targets: Tensor,
    vocab: int | None,
    dtype: torch.dtype,
    head: Head,
    skip_inactive: bool,
    normalizer: float | Tensor | None,
    floats: dict[str, Tensor | None],
    masks: dict[str, Tensor | None],
    sequence_ids: Tensor | None,
    statistics: Sequence[str],
) -> _Batch:
    if not isinstance(objective, Objective):
        raise TypeError(f"{caller}: objective must be an Objective; got {type(objective).__name__}")
    floats, masks = validate.check_token_inputs(caller, targets, floats, masks)
    for name in objective.needed:
        if floats[name] is None:
            raise ValueError(f"{caller}: {name} must be a tensor, which {objective.needs[name]} needs; got None")
    names = check_statistics(caller, (*objective.statistics, *check_statistics(caller, statistics)))
    validate.check_flag(caller, "skip_inactive", skip_inactive)
    validate.check_sequence_ids(caller, targets, sequence_ids)
    flat, active = _active(targets, head, masks["mask"])
    if vocab is not None:  # that of a part says nothing
        validate.check_range(caller, flat, active, vocab, head.ignore_index)
    if masks["expert_mask"] is None:
        expert = torch.full_like(active, objective.supervised)
    else:
        expert = masks["expert_mask"].reshape(-1)
    advantages = floats["advantages"]
    live = objective.has_gradient(expert, None if advantages is None else advantages.reshape(-1))
    masks = {"own": None, "active": None, "live": None}
    if torch.compiler.is_compiling():
        rows, computed = Rows.every(active), active & live if skip_inactive and not objective.coupled else active
        masks = {"own": computed & ~expert, "active": computed, "live": live}
        expert = computed & expert
    elif objective.coupled:  # its tokens stay together and in order: no others are known before all are
        rows = Rows.choose(active)
    else:
        # The expert tokens of a reference head lie together, so that they need not be looked for again.
        rows = Rows.choose(
            active, live, drop_others=skip_inactive, leading=expert if objective.reference_head else None
        )
    sequences = None
    if objective.needs_sequences:
        sequences = validate.sequences(caller, targets, sequence_ids)
    weights, count = None, active.sum()
    if objective.reduction == "sequence_mean":
        assert sequences is not None
        weights = 1 / sequences.total(active.to(dtype)).clamp(min=1)
    if normalizer is None:
        divisor = filled(_default_normalizer(objective, active, count, sequences), dtype, flat.device)
    else:
        divisor = validate.divisor(caller, normalizer, dtype, flat.device)
    return _Batch(
        objective=objective,
        rows=rows,
        targets=rows.counting(rows.take(flat)),
        expert=rows.take(expert),
        inputs={n: None if t is None else rows.take(t.reshape(-1)).to(dtype) for n, t in floats.items()},
        sequences=sequences.map(rows.take) if sequences and objective.coupled else None,
        weights=None if weights is None else rows.take(weights),
        statistics=names,
        normalizer=divisor,
        counts={"tokens": count, "zero_gradient_tokens": (active & ~live).sum()},
        shape=targets.shape,
        **masks,
    )


def _active(targets: Tensor, head: Head, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(targets [N], which of them take part [N])."""
    flat = targets.reshape(-1)
    active = flat != head.ignore_index
    return flat, active if mask is None else active & (mask.reshape(-1) != 0)


def _default_normalizer(
    objective: Objective, active: Tensor, count: Tensor, sequences: Sequences | None
) -> float | Tensor:
    if objective.reduction == "sum":
        return 1.0
    if objective.reduction == "token_mean":
        return count.clamp(min=1)
    assert sequences is not None
    return sequences.with_any(active).clamp(min=1)


class _PolicyLoss(torch.autograd.Function):
    """Loss and gradients in one pass over the logits; the backward hands the gradients over."""

    @staticmethod
    def forward(ctx: Any, job: _Job, batch: _Batch, *params: Tensor | None) -> tuple[Tensor, ...]:
        values, ctx.grads = _PolicyLoss.run(job, batch, params)
        loss = batch.loss(batch.values(*values))
        ctx.job, ctx.batch = job, batch
        ctx.save_for_backward(*params)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*values)
        return loss, *values

    @staticmethod
    def run(job: _Job, batch: _Batch, params: _Params) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        source = job.source(params, job.rows, job.wants)
        extras = Collector(batch.statistics, job.rows.size, stats_dtype(source.dtype), source.device)
        if not any(job.wants):
            stats = job.forward_only(params, _Ask(True, batch.objective.reads_logit, extras))
            return batch.flat(stats, extras), source.gradients()
        slopes, fused = (lambda at, stats: batch.slopes(at, stats, extras)), batch.fused(job.kernel)
        stats = stream.forward(
            source, job.kernel, job.rows, job.targets, job.head, True, slopes, fused, extras,
            by_logit=batch.objective.reads_logit,
        )  # fmt: skip
        if isinstance(source, LinearSource) and source.left_out is not None:
            batch.counts["grad_left_out"] = source.left_out
        return batch.flat(stats, extras), source.gradients()

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        _refuse_second_derivative("linear_policy_loss")
        validate.refuse_batched("linear_policy_loss", g_loss)
        params: _Params = ctx.saved_tensors
        if g_loss is None:
            return (None,) * (2 + len(params))
        # The first backward gives its gradients away (they are scaled in place, and become `.grad`); a second one
        # through a retained graph makes its own.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, grads = _PolicyLoss.run(ctx.job, ctx.batch, params)
        return None, None, *_finished(grads, params, g_loss / ctx.batch.normalizer)


def _anchored(out: PolicyLoss, params: _Params, ref: _Params, batch: _Batch, head: Head, kernel: _Kernel) -> PolicyLoss:
    """The loss and the divergence of its expert tokens from a reference, where the objective has one."""
    o = batch.objective
    if not o.reference_head:
        return out
    weights = batch.expert.to(batch.normalizer.dtype) * (o.expert_coef * o.asft_kl)
    weights = weights if batch.weights is None else weights * batch.weights
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = params, ref
    assert hidden is not None
    assert weight is not None
    assert ref_hidden is not None
    assert ref_weight is not None
    ref_hidden, rows = ref_hidden.reshape(-1, ref_hidden.shape[-1]), batch.rows.front()
    if rows is not None:
        ref, weights = (ref_hidden, ref_weight, ref_bias), rows.counting(weights[: rows.size])
        anchor = divergence.anchor(
            "linear_policy_loss", rows, weights, batch.normalizer, head, params, ref, streamed=kernel is not None
        )
    else:
        weights = batch.rows.spread(weights)
        anchor = linear_divergence(
            hidden, weight, ref_hidden, ref_weight, mask=weights != 0, weights=weights, normalizer=batch.normalizer,
            bias=bias, ref_bias=ref_bias, temperature=head.temperature, softcap=head.softcap,
            logit_scale=head.logit_scale, backend="reference" if kernel is None else "torch",
        ).loss  # fmt: skip
    more = {name: out.metrics[name] + anchor.detach() for name in ("loss", "loss_expert")}
    return out._replace(loss=out.loss + anchor, metrics={**out.metrics, **more})


def _two_pass(caller: str, params: _Params, batch: _Batch, head: Head, kernel: _Kernel) -> PolicyLoss:
    """Log-probabilities first, then the objective on vectors, by autograd."""
    o = batch.objective
    values = _token_values(
        caller, params, batch.rows, batch.targets, head, kernel, True,
        target_logits=o.reads_logit, statistics=batch.statistics, active=batch.active,
    )  # fmt: skip
    loss = batch.loss(values)
    if values.logprobs.requires_grad and not loss.requires_grad:  # no part has a weight: a gradient of zeros
        loss = loss + torch.where(torch.ones_like(batch.expert), 0, values.logprobs).sum()
    return batch.result(loss, values)


def _compiled(params: _Params, batch: _Batch, head: Head, kernel: ops.Named) -> PolicyLoss:
    """Inside torch.compile: a single pass is one operator."""
    if batch.objective.coupled:
        return _two_pass("linear_policy_loss", params, batch, head, kernel)
    total, values, *_ = torch.ops.trapo_kernels.policy_loss(
        *ops.three(params), batch.targets, batch.active, batch.live, batch.expert, *batch.inputs.values(),
        batch.weights, ops.objective_key(batch.objective), list(batch.statistics),
        *ops.plain(head, kernel, _wanted(params)),
    )  # fmt: skip
    return batch.result(total / batch.normalizer, batch.values(*values.unbind(0)))
