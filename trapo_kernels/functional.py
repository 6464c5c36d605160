"""This file has what users call. Arguments become a `Call` and a `Batch` (call.py, batch.py); paths.py computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import validate
from .arguments.temperatures import head_of, of_tokens
from .batch import Batch, PolicyLoss, make_batch
from .call import Call, call_of_linear, call_of_logits, over_shards, with_adapter
from .objective import Objective
from .paths import batch_of_logprobs, facts_of_loss, from_values, over_parts, policy_loss, two_passes, values_of_targets
from .shards import vocab_parallel
from .statistics import check_statistics
from .support.restricted import logprobs_in, policy_loss_in, refuse_beside

__all__ = [
    "PolicyLoss",
    "TokenLogprobs",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_statistics",
    "logprobs_from_logits",
    "policy_loss_from_logits",
    "policy_loss_from_logprobs",
]


class TokenLogprobs(NamedTuple):
    """Holds log-probabilities of the targets [...] and entropies [...] (None where not asked for), in nats, fp32 (fp64
    for fp64 inputs). Zero at ignored tokens."""

    logprobs: Tensor
    entropy: Tensor | None


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    support: Tensor | tuple[Tensor, Tensor] | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    backend: str | None = None,
    group: Any = None,
) -> TokenLogprobs:
    """Computes log-probabilities (and entropies) of targets under a linear head, without the `[tokens, vocab]` logits.

    One GEMM forward; the backward recomputes the logits chunk by chunk (three GEMMs), and skips tokens whose incoming
    gradient is zero. Both outputs are differentiable once in hidden, weight and bias.

    Args:
        hidden: [..., D] float16, bfloat16, float32 or float64.
        weight: [V, D], of hidden's dtype and device. Inside torch.autocast hidden, weight and bias of different dtypes
            are cast as by F.linear; gradients come back in their own.
        targets: [...] int64 in [0, V), or ignore_index: 0 and no gradient there.
        bias: [V], of hidden's dtype and device.
        temperature, softcap, logit_scale: z = softcap · tanh(logit_scale · (h Wᵀ + b) / softcap) / temperature.
            Numbers; a 0-dim tensor is read, which waits for a device. The temperature may be a tensor [...], or one per
            sequence, of constants, where there is no bias and no soft-cap; on a device one not above 0 gives NaN.
        entropy: also return the entropy of each token's distribution.
        support: [..., K] int64, ids that the token was sampled from (top-k, top-p, min-p), its target among them; -1
            for none; or (ids [M], offsets [N + 1]) of the N tokens, where sizes differ. The distribution is the one
            over these ids; of a token without any it is over all. Not with a group.
        lora: (A [r, D], B [V, r], scale): the head is W + scale · B A, which is not made; beside a frozen weight there
            is no GEMM for a gradient of its size. A and B may be float32 beside 16-bit hidden states. Not with a group;
            under torch.compile, with a support and for backend="reference" the weight is copied.
        backend: "torch", "reference", ...; None = the fastest here. See `backends()`.
        group: a ProcessGroup whose ranks hold the rows of weight (and bias) in order, in parts of any size; hidden and
            targets (ids in the whole vocabulary) are the same on all. A DTensor weight that is Shard(0) brings its
            own. The gradient of hidden is whole on every rank, that of weight is of the part.

    Raises:
        TypeError, ValueError: one line naming the argument, what it accepts and what it got. Values of targets are
            checked on the CPU; on an accelerator one out of range trips the device's index assertion (`torch`) or makes
            its token, and with it the loss, NaN (`triton`, `cuda`).

    Example:
        >>> hidden, head = torch.randn(2, 5, 8), torch.nn.Linear(8, 100, bias=False)
        >>> found = linear_logprobs(hidden, head.weight, torch.randint(0, 100, (2, 5)), entropy=True)
        >>> found.logprobs.shape, bool((found.logprobs <= 0).all())
        (torch.Size([2, 5]), True)
    """
    caller = "linear_logprobs"
    hidden, weight, bias, group = vocab_parallel.local_parts(caller, hidden, weight, bias, group)
    hidden, weight, adapter = with_adapter(caller, lora, hidden, weight, backend, support, group=group)
    if support is not None:
        refuse_beside(caller, group=group)
        validate.check_flag(caller, "entropy", entropy)
        return TokenLogprobs(
            *logprobs_in(
                caller, hidden, weight, targets, support, mask=None, entropy=entropy, bias=bias, softcap=softcap,
                temperature=temperature, logit_scale=logit_scale, ignore_index=ignore_index, backend=backend,
            )
        )  # fmt: skip

    def prepare() -> tuple[Call, dict[str, Any]]:
        options = {"softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index}
        states, head = head_of(caller, hidden, temperature, bias, **options)
        call = call_of_linear(caller, head, states, weight, bias, targets, backend, group, adapter=adapter)
        validate.check_flag(caller, "entropy", entropy)
        return call, {} if group is None else call.facts(targets, entropy, temperatures=of_tokens(temperature))

    call, sizes = over_shards(caller, group, weight, prepare)
    return _logprobs(caller, call if group is None else call.sharded(group, sizes), targets, entropy)


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
    """Computes what `linear_logprobs` does, of logits [..., V] that exist already. Beside their gradient nothing of
    their size is made. Raises what that does.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> logprobs_from_logits(logits, torch.tensor([0, -100])).logprobs
        tensor([-0.6931,  0.0000])
    """
    caller = "logprobs_from_logits"
    head = validate.check_head(
        caller, temperature=temperature, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index
    )
    call = call_of_logits(caller, head, logits, targets, backend)
    validate.check_flag(caller, "entropy", entropy)
    return _logprobs(caller, call, targets, entropy)


def _logprobs(caller: str, call: Call, targets: Tensor, entropy: bool) -> TokenLogprobs:
    selection, (logprobs, entropies, _, _) = values_of_targets(caller, call, targets, entropy=entropy)
    shape = targets.shape
    return TokenLogprobs(
        selection.spread(logprobs).reshape(shape),
        selection.spread(entropies).reshape(shape) if entropy and entropies is not None else None,
    )


@torch.no_grad()
def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Sequence[str],
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> dict[str, Tensor]:
    """Computes statistics of each token's distribution under a linear head [...], without the `[tokens, vocab]` logits
    and without gradient: "top20_mass", "top20_entropy" (any k), "sum_sq", "argmax_match", "mean_logit". One GEMM.

    Args:
        statistics: names; statistics.py says what each is. Zero at ignored tokens.
        hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, backend: as `linear_logprobs`.

    Raises:
        TypeError, ValueError: as `linear_logprobs`.

    Example:
        >>> linear_statistics(torch.zeros(1, 2), torch.eye(4, 2), torch.tensor([0]), ["sum_sq", "mean_logit"])
        {'sum_sq': tensor([0.2500]), 'mean_logit': tensor([0.])}
    """
    caller = "linear_statistics"
    options = {"softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index}
    hidden, head = head_of(caller, hidden, temperature, bias, **options)
    call = call_of_linear(caller, head, hidden, weight, bias, targets, backend)
    names = check_statistics(caller, statistics)
    selection, found = values_of_targets(caller, call, targets, statistics=names)
    return {name: selection.spread(values).reshape(targets.shape) for name, values in found.statistics.items()}


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
    policy_weights: Tensor | None = None,
    expert_mask: Tensor | None = None,
    mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    expert_normalizer: float | Tensor | None = None,
    skip_inactive: bool = False,
    statistics: Sequence[str] = (),
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    support: Tensor | tuple[Tensor, Tensor] | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    grad_tolerance: float = 0.0,
    weight_grad: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
    group: Any = None,
) -> PolicyLoss:
    """Computes the loss of `objective` over a linear head, without the `[tokens, vocab]` logits: three GEMMs in all.

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
        policy_weights: [...] or one per sequence, at least 0: what the policy term of an own token is multiplied by,
            forward and backward, beside tis_cap's weight; expert term, entropy bonus and KL term are not. 0: the token
            has no policy term. For importance corrections of a trainer's own, and normalizers of the policy term's own.
        expert_mask: [...] bool: True = expert-prefix token (expert term), False = own token (policy term). None: all
            own; all expert where the objective has an expert term and no policy term.
        mask: [...] bool, None = all. Masks may also be 0 and 1 of an integer dtype.
        sequence_ids: [...] int64: which sequence a token belongs to, for objectives that need to know
            (`Objective.needs_sequences`); None = the last dimension of targets is one. In a sequence, tokens stand in
            order.
        normalizer: the weighted sum of token losses is divided by this number (above 0) or 0-dim tensor (where 0, of a
            batch without a token, counts as 1), a constant; None = what the objective's reduction says (by default the
            number of active tokens), or 1. Across micro-batches and ranks pass one global number, and sum.
        expert_normalizer: what the losses of expert tokens are divided by in its place, where each region has a mean of
            its own (CHORD; SFT beside RL); None = normalizer, or with reduction="region_mean" the number of active
            expert tokens.
        skip_inactive: leave active tokens without gradient out of everything but the count (and of a coupled
            objective's sequences nothing).
        statistics: names of statistics of a row (statistics.py has them) whose means over computed tokens are added to
            the metrics.
        ref_hidden, ref_weight, ref_bias: [..., D'], [V, D'] and [V] of a frozen reference, for expert="asft".
        support: as `linear_logprobs`: ratio, policy term and entropy are of the distribution that a token was sampled
            from. Two passes; the objective must read log-probabilities and entropies alone.
        lora: as `linear_logprobs`; for expert="asft" the weight is copied. Not with weight_grad.
        grad_tolerance: share of the logit gradients' mass Σ|dL/dz| that may be left out where that saves work, in
            [0, 1); 0 = exact. The metric grad_left_out is the share that was. Only backend "cpu" saves any, in fp32.
        weight_grad: [V, D] float32 (float64 for float64), as weight.grad: weight's gradient is added to it, not handed
            over. Call `backward()` on the loss itself: a factor is an error, on a GPU NaN in all gradients.
        bias, temperature, softcap, logit_scale, ignore_index, backend, group: as `linear_logprobs`.

    Advantages, policy_weights and the given logprobs are constants: no gradient flows into them.

    Raises:
        TypeError, ValueError: as `linear_logprobs`.

    Example:
        >>> hidden, head = torch.randn(2, 5, 8), torch.nn.Linear(8, 100, bias=False)
        >>> targets, expert = torch.randint(0, 100, (2, 5)), torch.zeros(2, 5, dtype=torch.bool)
        >>> expert[:, :2] = True                               # the expert wrote the first two tokens of each
        >>> out = linear_policy_loss(hidden, head.weight, targets, Objective.trapo(),
        ...                          advantages=torch.tensor([1.0, -0.5]), expert_mask=expert)
        >>> out.loss.backward()
        >>> int(out.metrics["expert_tokens"]), head.weight.grad.shape
        (4, torch.Size([100, 8]))
    """
    caller = "linear_policy_loss"
    hidden, weight, bias, group = vocab_parallel.local_parts(caller, hidden, weight, bias, group)
    beside = {"group": group, "weight_grad": weight_grad}
    hidden, weight, adapter = with_adapter(caller, lora, hidden, weight, backend, support, objective, **beside)
    floats = {"advantages": advantages, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
    floats |= {"rollout_logprobs": rollout_logprobs, "policy_weights": policy_weights}
    masks, ref = {"expert_mask": expert_mask, "mask": mask}, (ref_hidden, ref_weight, ref_bias)
    divisors = {"normalizer": normalizer, "expert_normalizer": expert_normalizer}
    of_batch: dict[str, Any] = {"floats": floats, "masks": masks, "divisors": divisors, "sequence_ids": sequence_ids}
    of_batch |= {"skip_inactive": skip_inactive, "statistics": statistics}
    options: dict[str, Any] = {"softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index}
    if support is not None:
        refuse_beside(caller, **beside, ref_hidden=ref_hidden)
        of_batch |= {"grad_tolerance": grad_tolerance, "bias": bias, "temperature": temperature, "backend": backend}
        return policy_loss_in(caller, hidden, weight, targets, support, objective, **of_batch, **options)

    def prepare() -> tuple[tuple[Call, Batch, float], dict[str, Any]]:
        states, head = head_of(caller, hidden, temperature, bias, **options)
        call = call_of_linear(caller, head, states, weight, bias, targets, backend, group, weight_grad, adapter)
        vocab = call.columns if group is None else None
        batch = make_batch(caller, objective, targets, head, vocab=vocab, dtype=call.stats_dtype, **of_batch)
        made = call, batch, validate.check_grad_tolerance(caller, grad_tolerance)
        return made, facts_of_loss(caller, group, made, targets, of_batch, ref, temperature)

    (call, batch, tolerance), sizes = over_shards(caller, group, weight, prepare)
    call = call if group is None else over_parts(caller, call, targets, mask, group, sizes)
    return policy_loss(caller, call, batch, validate.under_autocast(*ref), tolerance)


def policy_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    objective: Objective,
    *,
    advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    policy_weights: Tensor | None = None,
    expert_mask: Tensor | None = None,
    mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    expert_normalizer: float | Tensor | None = None,
    skip_inactive: bool = False,
    statistics: Sequence[str] = (),
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> PolicyLoss:
    """Computes what `linear_policy_loss` does, of logits [..., V] that exist already. Beside their gradient nothing of
    their size is made. Raises what that does.

    Example:
        >>> policy_loss_from_logits(torch.zeros(1, 4), torch.tensor([2]), Objective.sft()).loss
        tensor(1.3863)
    """
    caller = "policy_loss_from_logits"
    head = validate.check_head(
        caller, temperature=temperature, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index
    )
    call = call_of_logits(caller, head, logits, targets, backend)
    batch = make_batch(
        caller, objective, targets, head, vocab=call.columns, dtype=call.stats_dtype, skip_inactive=skip_inactive,
        divisors={"normalizer": normalizer, "expert_normalizer": expert_normalizer},
        floats={
            "advantages": advantages, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs,
            "rollout_logprobs": rollout_logprobs, "policy_weights": policy_weights,
        },
        masks={"expert_mask": expert_mask, "mask": mask}, sequence_ids=sequence_ids, statistics=statistics,
    )  # fmt: skip
    if objective.reference_head:
        raise ValueError(f"{caller}: objective must not need a reference head; got expert='asft'")
    return two_passes(caller, call, batch)


def policy_loss_from_logprobs(
    logprobs: Tensor,
    objective: Objective,
    *,
    entropy: Tensor | None = None,
    advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    policy_weights: Tensor | None = None,
    expert_mask: Tensor | None = None,
    mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    expert_normalizer: float | Tensor | None = None,
    skip_inactive: bool = False,
) -> PolicyLoss:
    """Computes the loss of `objective` from log-probabilities that exist already: for trainers whose engines hand over
    those.

    It is the same function of them as in `linear_policy_loss` (terms.py has the formulas), differentiable any number of
    times in logprobs and entropy. Where hidden states are at hand, `linear_policy_loss` costs a GEMM less.

    Args:
        logprobs: [...] float16, bfloat16, float32 or float64: log-probabilities of the tokens, nats. The loss is
            computed in float32, and in float64 for float64.
        objective: the terms. They must read log-probabilities and entropies of tokens alone: no logits, no statistics
            of a row, no reference head.
        entropy: [...] of each token's distribution, nats; needed for an entropy bonus. None: there is no metric
            "entropy", and the result's entropies are zeros.
        mask: [...] bool, None = all; masked tokens give 0, whatever they hold.
        advantages, old_logprobs, ref_logprobs, rollout_logprobs, policy_weights, expert_mask, sequence_ids,
            normalizer, expert_normalizer, skip_inactive: as `linear_policy_loss`, with the shape of logprobs in the
            place of that of targets.

    Raises:
        TypeError, ValueError: as `linear_logprobs`.

    Example:
        >>> logprobs = torch.tensor([-0.5, -2.0], requires_grad=True)
        >>> out = policy_loss_from_logprobs(logprobs, Objective.grpo(), advantages=torch.tensor([1.0, -1.0]))
        >>> out.loss.backward()
        >>> logprobs.grad                                      # −A of each, over two tokens
        tensor([-0.5000,  0.5000])
    """
    batch, values = batch_of_logprobs(
        "policy_loss_from_logprobs", logprobs, objective, entropy, skip_inactive=skip_inactive,
        divisors={"normalizer": normalizer, "expert_normalizer": expert_normalizer},
        floats={
            "advantages": advantages, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs,
            "rollout_logprobs": rollout_logprobs, "policy_weights": policy_weights,
        },
        masks={"expert_mask": expert_mask, "mask": mask}, sequence_ids=sequence_ids,
    )  # fmt: skip
    out = from_values(batch, values)
    if entropy is None:
        del out.metrics["entropy"]
    return out
