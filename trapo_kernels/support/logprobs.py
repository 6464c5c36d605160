"""This file computes log-probabilities on a support: K ids a token, with the tail accounted for, without the `[tokens,
vocab]` logits.

A support is what a teacher's top-k, a sampling mask or a set of candidates is. `linear_support_logprobs` gives what all
losses on one are functions of; topk_divergence.py has those whose gradients are made in the forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..arguments import validate
from ..arguments.temperatures import into_hidden, of_tokens
from ..autograd import apply
from ..backends.base import RowKernel
from ..call import Call, Named, call_of_head, in_one_dtype, over_shards, wanted
from ..chunks.selection import Selection
from ..shards import vocab_parallel
from . import gathered, ops
from .autograd import StreamedSupport, make_job
from .rows import SupportValues, normalize, once

__all__ = ["SupportLogprobs", "Supported", "linear_support_logprobs", "materialize", "prepare", "restricted_logprobs"]


class SupportLogprobs(NamedTuple):
    """Holds log-probabilities [..., K] of the ids, 0 where there is none; the log-mass [...] of all other classes, −inf
    where there are no others; entropies [...] (None where not asked for). In nats, fp32 (fp64 for fp64 inputs)."""

    logprobs: Tensor
    tail: Tensor | None
    entropy: Tensor | None


@dataclass(frozen=True)
class Supported:
    """Is a head on hidden states [N, D], and a support of each: ids [N, K], each once a row."""

    call: Call
    ids: Tensor
    owner: Tensor  # [N, K]: the position at which an id stands first in its row
    there: Tensor  # [N, K]: an id, first or not
    wrong: Tensor | None  # [N, K]: an id out of range; None: they have been looked at
    active: Tensor  # [N]

    @property
    def vocab(self) -> int:
        return self.call.vocab


def linear_support_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    restrict: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    backend: str | None = None,
    group: Any = None,
) -> SupportLogprobs:
    """Computes log-probabilities of K ids of each token under a linear head, and the log-mass of all others.

    One GEMM forward; the backward recomputes the logits (three GEMMs), for tokens with an incoming gradient. All
    outputs are differentiable once in hidden, weight and bias. The tail is summed by itself, not as 1 − Σ: it keeps its
    digits when next to nothing is left of it.

    Args:
        hidden, weight, bias, temperature, softcap, logit_scale, backend, group: as `linear_logprobs`.
        ids: [..., K] int64 in [0, V), or -1 for none. An id that stands twice counts once in the tail, and has its
            log-probability at both places.
        restrict: the distribution is the one over the ids alone, as a sampling mask (top-k, top-p, min-p) leaves it;
            there is no tail (None). With few ids only their logits are computed.
        mask: [...] bool, None = all tokens; others cost nothing and give 0.
        entropy: also return the entropy of each token's distribution.

    Raises:
        TypeError, ValueError: one line naming the argument, what it accepts and what it got. Values of ids are checked
            on the CPU; elsewhere one out of range makes its token NaN.

    Example:
        >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.eye(3, 2)
        >>> out = linear_support_logprobs(hidden, weight, torch.tensor([[0, 2]]))
        >>> out.logprobs, out.tail                             # of ids 0 and 2, and of all others together
        (tensor([[-0.5514, -1.5514]]), tensor([-1.5514]))
    """
    caller = "linear_support_logprobs"
    validate.check_flag(caller, "restrict", restrict)
    validate.check_flag(caller, "entropy", entropy)
    options = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    on = prepare(caller, hidden, weight, ids, bias, mask, backend, group, (restrict, entropy), {}, **options)
    if on.call.kernel is None:
        found = materialize(on, restrict)
    elif restrict:
        found = restricted_logprobs(caller, on)
    else:
        found = _streamed(caller, on, entropy)
    shape = ids.shape
    logprobs, tail, entropies = found
    return SupportLogprobs(
        _fill(on, logprobs).reshape(shape),
        None if restrict or tail is None else _of_tokens(on, tail).reshape(shape[:-1]),
        _of_tokens(on, entropies).reshape(shape[:-1]) if entropy and entropies is not None else None,
    )


def prepare(
    caller: str,
    hidden: Any,
    weight: Any,
    ids: Any,
    bias: Any,
    mask: Any,
    backend: str | None,
    group: Any,
    settings: Any,
    inputs: dict[str, Any],
    **options: Any,
) -> Supported:
    """Makes the call, checked; `inputs` are further tensors that a rank must have in common with others, by
    agreement.py's names, and `settings` numbers and words.

    Raises:
        TypeError, ValueError: an argument is wrong; one line names it.
    """
    hidden, weight, bias, group = vocab_parallel.local_parts(caller, hidden, weight, bias, group)

    def check() -> tuple[Call, dict[str, Any]]:
        given = options["temperature"]
        states, left = into_hidden(caller, hidden, given, bias, options["softcap"])
        head = validate.check_head(caller, **{**options, "temperature": left})
        vocab = weight.shape[0] if group is None and isinstance(weight, Tensor) and weight.ndim else None
        call = call_of_head(
            caller, head, states, weight, bias, backend, group, lambda h: validate.check_ids(caller, ids, h, vocab)
        )
        masks = validate.check_token_inputs(caller, hidden[..., 0], {}, {"mask": mask}, "hidden")[1]
        common = {**inputs, "mask": masks["mask"], "temperatures": of_tokens(given)}
        found = {} if group is None else call.facts(ids, settings, given=mask is None, **common)
        return call, found

    call, sizes = over_shards(caller, group, weight, check)
    call = call if group is None else call.sharded(group, sizes)
    if group is not None:
        validate.check_ids(caller, ids, hidden, sum(sizes))
    flat = ids.reshape(-1, ids.shape[-1]) if ids.numel() else ids.new_empty(ids.shape[:-1].numel(), ids.shape[-1])
    wrong = None
    if not validate.can_look(flat):
        wrong = (flat < -1) | (flat >= call.vocab)
        flat = flat.masked_fill(wrong, -1)
    active = flat.new_ones(flat.shape[0], dtype=torch.bool) if mask is None else mask.reshape(-1) != 0
    ids, owner = once(flat)
    return Supported(call, ids, owner, flat >= 0, wrong, active)


def _streamed(caller: str, on: Supported, entropy: bool) -> SupportLogprobs:
    """Returns the values of all rows; the tail of one without ids is 0, and costs nothing where its entropy is not
    asked for."""
    active = on.active if entropy else on.active & (on.ids >= 0).any(1)
    call = on.call
    if isinstance(call.kernel, Named):
        values = ops.run_support(call, call.kernel, on.ids, active, entropy)
    else:
        assert isinstance(call.kernel, RowKernel)
        job, mine = make_job(call.kernel, call.head, Selection.choose(active), on.ids, wanted(call.params))
        values = SupportValues(*apply(StreamedSupport, caller, job, mine, entropy, *call.params))
    inside = values.inside.masked_fill(on.ids < 0, -torch.inf)
    logprobs, tail = normalize(inside, values.outside)
    return SupportLogprobs(_at_all(on, logprobs), tail, _entropy(logprobs, tail, values.entropy) if entropy else None)


def _at_all(on: Supported, logprobs: Tensor) -> Tensor:
    """Returns the values also at places where an id stands again."""
    return logprobs.gather(1, on.owner)


def _entropy(logprobs: Tensor, tail: Tensor | None, of_rest: Tensor | None) -> Tensor:
    """Returns H = Σ π (−log π) over the support + T (H' − log T), T the tail's mass and H' the entropy of what is in
    it."""
    found = -_weighted(logprobs, logprobs).sum(1)
    if tail is None or of_rest is None:
        return found
    return found + _weighted(tail, of_rest - tail)


def _weighted(log_p: Tensor, values: Tensor) -> Tensor:
    """Returns p · values; 0 where p is, and nothing to the gradient."""
    none = log_p == -torch.inf
    return log_p.masked_fill(none, 0).exp() * values.masked_fill(none, 0) * ~none


def restricted_logprobs(caller: str, on: Supported) -> SupportLogprobs:
    """Returns log-probabilities of the distributions over the ids alone; of few ids by their logits alone."""
    call, there = on.call, on.ids >= 0
    if gathered.pays(on.ids.shape[1], on.vocab):
        ids = on.ids.masked_fill(~on.active[:, None], -1)
        if isinstance(call.kernel, Named):
            x = ops.run_gathered(call, ids)
        else:
            assert isinstance(call.kernel, RowKernel)
            arguments = (ids, call.head.scale, call.kernel.shard, wanted(call.params))
            x = apply(gathered.GatheredLogits, caller, *arguments, *call.params)
        z = x if call.head.cap is None else call.head.cap * torch.tanh(x / call.head.cap)
    else:
        active = on.active & there.any(1)
        if isinstance(call.kernel, Named):
            z = ops.run_support(call, call.kernel, on.ids, active, False).inside
        else:
            assert isinstance(call.kernel, RowKernel)
            job, mine = make_job(call.kernel, call.head, Selection.choose(active), on.ids, wanted(call.params))
            z = apply(StreamedSupport, caller, job, mine, False, *call.params)[0]
    return _over_ids(on, z)


def _over_ids(on: Supported, z: Tensor) -> SupportLogprobs:
    """Returns log-probabilities of the distributions over the ids alone, from their logits up to a constant a row [N,
    K]."""
    there = on.ids >= 0
    # A row without ids has one class, so that nothing in it is NaN.
    outside = torch.where(there.any(1), -torch.inf, z.new_zeros(()))
    logprobs, _ = normalize(z.masked_fill(~there, -torch.inf), outside)
    return SupportLogprobs(_at_all(on, logprobs), None, _entropy(logprobs, None, None))


def materialize(on: Supported, restrict: bool) -> SupportLogprobs:
    """Computes the oracle's values: all logits, plain autograd."""
    hidden, weight, bias = in_one_dtype(on.call.params)
    assert hidden is not None
    assert weight is not None
    head, there = on.call.head, on.ids >= 0
    z = reference.linear_logits(torch.where(on.active[:, None], hidden, 0), weight, bias) * head.scale
    z = z if head.cap is None else head.cap * torch.tanh(z / head.cap)
    chosen = torch.zeros_like(z, dtype=torch.bool)
    if on.ids.shape[1]:
        counted = torch.zeros_like(z, dtype=torch.int32).scatter_add(1, on.ids.clamp(min=0), there.to(torch.int32))
        chosen = counted > 0
    if restrict:
        z = torch.where(chosen | ~there.any(1)[:, None], z, -torch.inf)
    log_pi = z.log_softmax(1)
    logprobs = log_pi.gather(1, on.ids.clamp(min=0)) if on.ids.shape[1] else log_pi[:, :0]
    # Where there is no tail the derivative of its logarithm would be NaN.
    some = (~chosen & (log_pi != -torch.inf)).any(1)
    others = torch.where(chosen & some[:, None], -torch.inf, log_pi)
    tail = torch.where(some, others.logsumexp(1), torch.where(log_pi.isnan().any(1), torch.nan, -torch.inf))
    entropy = -_weighted(log_pi, log_pi).sum(1)
    entropy = torch.where(there.any(1), entropy, 0) if restrict else entropy
    return SupportLogprobs(_at_all(on, logprobs), tail, entropy)


def _fill(on: Supported, logprobs: Tensor) -> Tensor:
    """Returns 0 where there is no id or the token does not count; NaN where an id is out of range."""
    found = logprobs.masked_fill(~(on.there & on.active[:, None]), 0)
    return found if on.wrong is None else found.masked_fill(on.wrong & on.active[:, None], torch.nan)


def _of_tokens(on: Supported, values: Tensor) -> Tensor:
    found = values.masked_fill(~on.active, 0)
    return found if on.wrong is None else found.masked_fill(on.wrong.any(1) & on.active, torch.nan)
