"""This file computes log-probabilities of targets under the sampling mask that each was drawn with: top-k, top-p or
min-p leave some ids of a token, over which its probabilities add up to 1.

A ratio of such log-probabilities is what importance sampling means where an engine samples from the restricted
distribution (DeepSeek-V3.2 keeps the mask). A token without ids has the whole vocabulary, as one that a forced prefix
has put there: of those rows alone all logits are computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import validate
from ..arguments.graph import refuse_in_graph
from ..arguments.temperatures import head_of
from ..batch import PolicyLoss
from ..call import call_of_linear
from ..paths import batch_of_logprobs, from_values, values_of_targets
from .logprobs import linear_support_logprobs
from .ragged import of_similar_size

__all__ = ["logprobs_in", "policy_loss_in", "refuse_beside"]


def refuse_beside(caller: str, **given: Any) -> None:
    """Refuses what does not go with a support.

    Raises:
        ValueError: one of them is not None.
    """
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{caller}: support must be None where {name} is given; got both")


def policy_loss_in(
    caller: str,
    hidden: Any,
    weight: Any,
    targets: Any,
    support: Any,
    objective: Any,
    *,
    floats: dict[str, Tensor | None],
    masks: dict[str, Tensor | None],
    divisors: dict[str, float | Tensor | None],
    sequence_ids: Tensor | None,
    skip_inactive: bool,
    statistics: Any,
    grad_tolerance: Any,
    ignore_index: Any,
    **options: Any,
) -> PolicyLoss:
    """Returns the loss of an objective of log-probabilities and entropies that are `logprobs_in` a support.

    Raises:
        TypeError, ValueError: an argument is wrong; one line names it.
    """
    refuse_beside(caller, statistics=statistics or None, grad_tolerance=grad_tolerance or None)
    logprobs, entropies = logprobs_in(
        caller, hidden, weight, targets, support, mask=masks["mask"], entropy=True, ignore_index=ignore_index, **options
    )
    counts, mask = targets != ignore_index, masks["mask"]
    batch, values = batch_of_logprobs(
        caller, logprobs, objective, entropies, floats=floats, divisors=divisors, sequence_ids=sequence_ids,
        masks={**masks, "mask": counts if mask is None else counts & (mask != 0)}, skip_inactive=skip_inactive,
    )  # fmt: skip
    return from_values(batch, values)


def logprobs_in(
    caller: str,
    hidden: Any,
    weight: Any,
    targets: Any,
    support: Any,
    *,
    mask: Tensor | None,
    entropy: bool,
    bias: Any,
    temperature: Any,
    softcap: Any,
    logit_scale: Any,
    ignore_index: Any,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Returns log-probabilities of targets [...] and entropies [...] (or None) of the distributions over the ids of
    support [..., K], -1 for none; 0 at tokens that do not count.

    Raises:
        TypeError, ValueError: an argument is wrong, or (on a CPU) a target is not among the ids of its token; on a
            device its log-probability is NaN.
    """
    refuse_in_graph(caller, "support", support)
    options: dict[str, Any] = {"softcap": softcap, "logit_scale": logit_scale}
    hidden, head = head_of(caller, hidden, temperature, bias, ignore_index=ignore_index, **options)
    options |= {"bias": bias, "temperature": head.temperature, "entropy": entropy, "backend": backend}
    if isinstance(support, (tuple, list)):
        return _by_size(caller, hidden, weight, targets, support, mask, ignore_index=ignore_index, **options)
    call = call_of_linear(caller, head, hidden, weight, bias, targets, backend)
    validate.check_ids(f"{caller}: support", support, hidden, call.columns)
    counts = targets != head.ignore_index
    if mask is not None:
        counts = counts & validate.check_token_inputs(caller, targets, {}, {"mask": mask})[1]["mask"]
    some = (support >= 0).any(-1)
    found = (support == targets[..., None]) & (support >= 0)
    outside = counts & some & ~found.any(-1)
    if validate.can_look(outside) and bool(outside.any()):
        raise ValueError(
            f"{caller}: targets must be among the ids of their support; got {int(outside.sum())} that are not"
        )
    inside = counts & some
    of_ids = linear_support_logprobs(hidden, weight, support, restrict=True, mask=inside, **options)
    place = found.int().argmax(-1, keepdim=True)
    logprobs = of_ids.logprobs.gather(-1, place).squeeze(-1).masked_fill(~inside, 0)
    logprobs = logprobs.masked_fill(outside, torch.nan)
    whole = targets.masked_fill(inside, head.ignore_index).masked_fill(~counts, head.ignore_index)
    selection, values = values_of_targets(caller, call, whole, entropy=entropy)
    logprobs = logprobs + selection.spread(values.logprobs).reshape(targets.shape)
    if not entropy or of_ids.entropy is None or values.entropy is None:
        return logprobs, None
    of_whole = selection.spread(values.entropy).reshape(targets.shape)
    return logprobs, of_ids.entropy.masked_fill(~inside, 0) + of_whole


def _by_size(
    caller: str,
    hidden: Any,
    weight: Any,
    targets: Any,
    support: Any,
    mask: Any,
    *,
    entropy: bool,
    bias: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Returns what `logprobs_in` does of supports that are not padded, some tokens of similar sizes at a time."""
    validate.check_linear(caller, *validate.under_autocast(hidden, weight, bias))
    validate.check_targets(caller, targets, "hidden", hidden)
    checked = validate.check_token_inputs(caller, targets, {}, {"mask": mask})[1]["mask"]
    mask = None if checked is None else checked.reshape(-1)
    states, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    found: list[Tensor] | None = None
    for rows, ids in of_similar_size(caller, support, targets):
        each = logprobs_in(
            caller, states[rows], weight, flat[rows], ids, mask=None if mask is None else mask[rows], entropy=entropy,
            bias=bias, **options,
        )  # fmt: skip
        some = [t for t in each if t is not None]
        found = [t.new_zeros(flat.shape) for t in some] if found is None else found
        found = [whole.index_copy(0, rows, t) for whole, t in zip(found, some, strict=True)]
    if found is None:  # no token
        zero = states.sum(-1) * 0
        found = [zero, zero][: 1 + entropy]
    logprobs, *others = (t.reshape(targets.shape) for t in found)
    return logprobs, others[0] if others else None
