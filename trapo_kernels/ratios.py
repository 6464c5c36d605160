"""This file has the ratios of the policy to others, and where a clip cuts them: what the terms and the metrics both
need.

r = exp(logp − old_logp) is the ratio, A the advantage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .tokens import Tokens, given

if TYPE_CHECKING:
    from .objective import Objective

__all__ = [
    "clipped",
    "clipped_where",
    "k3",
    "log_of_clipped_ratio",
    "log_ratio",
    "outside_clip",
    "possible",
    "probability",
    "ratio_unless",
    "tis_weight",
    "weighted",
]


def possible(logprobs: Tensor) -> Tensor:
    """Returns logp with 0 for −inf."""
    return logprobs.masked_fill(logprobs == -torch.inf, 0)


def log_ratio(t: Tokens) -> Tensor:
    """Returns log r = logp − old_logp [n]. A token of probability zero has log r = −inf whatever the old
    probability."""
    if "log_ratio" not in t.memo:  # terms and metrics need it of the same tokens
        t.memo["log_ratio"] = _log_ratio(t)
    found: Tensor = t.memo["log_ratio"]
    return found


def _log_ratio(t: Tokens) -> Tensor:
    impossible = t.logprobs == -torch.inf
    # Filled before the subtraction: −inf − −inf would leave NaN in its backward.
    filled = t.logprobs.masked_fill(impossible, 0)
    old = filled.detach() if t.old_logprobs is None else t.old_logprobs.masked_fill(impossible, 0)
    return (filled - old).masked_fill(impossible, -torch.inf)


def ratio_unless(stopped: Tensor, log_r: Tensor) -> Tensor:
    """Returns r unless it is `stopped`, else 1: an overflown r times a zero, here or in a backward, would be NaN."""
    return log_r.masked_fill(stopped, 0).exp()


def probability(t: Tokens) -> Tensor:
    """Returns p [n]."""
    if "probability" not in t.memo:
        t.memo["probability"] = t.logprobs.exp()
    found: Tensor = t.memo["probability"]
    return found


def log_of_clipped_ratio(o: Objective, t: Tokens) -> Tensor:
    """Returns the logarithm of the ratio that the policy term clips [n], with the gradient of logp: log r; for GSPO its
    mean over the own tokens of the sequence, as sg(mean) + logp − sg(logp)."""
    if o.policy != "gspo":
        return log_ratio(t)
    assert t.sequences is not None
    inside = t.own_tokens.to(t.logprobs.dtype)
    log_r = torch.where(t.own_tokens, log_ratio(t).detach(), 0)
    mean = t.sequences.total(log_r) / t.sequences.total(inside).clamp(min=1)
    logprobs = possible(t.logprobs)
    return mean + (logprobs - logprobs.detach())


def outside_clip(
    ratio: Tensor, advantages: Tensor, low: float | None, high: float | None, dual: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns where a clip to [1 − low, 1 + high] takes the gradient away, for A < 0 and A > 0, and where the dual one
    does. A bound of None is none."""
    none = torch.zeros_like(ratio, dtype=torch.bool)
    return (
        none if low is None else (advantages < 0) & (ratio < 1 - low),
        none if high is None else (advantages > 0) & (ratio > 1 + high),
        none if dual is None else (advantages < 0) & (ratio > dual),
    )


def clipped(o: Objective, t: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Returns where the clip takes the gradient away [n]: ratio too low (A < 0), too high (A > 0), beyond the dual
    clip."""
    return clipped_where(o, t, log_of_clipped_ratio(o, t))


def clipped_where(o: Objective, t: Tokens, log_r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return outside_clip(log_r.detach().exp(), given(t.advantages), o.clip_low, o.clip_high, o.dual_clip)


def k3(difference: Tensor) -> Tensor:
    """Returns e^d − 1 − d [n], of a difference of log-probabilities."""
    # Beyond 80 the exponential has absorbed the rest; unclamped, inf − inf would be NaN at d = inf.
    return torch.expm1(difference) - difference.clamp(max=80)


def tis_weight(o: Objective, t: Tokens) -> Tensor:
    """Returns sg(min(π_old / π_rollout, C)) [n]: truncated importance sampling of the engine that sampled the tokens; 0
    where π_old is, whatever π_rollout."""
    old = (t.logprobs if t.old_logprobs is None else t.old_logprobs).detach()
    weight = (old - given(t.rollout_logprobs)).exp().clamp(max=o.tis_cap)
    return weight.masked_fill(old == -torch.inf, 0)


def weighted(weight: Tensor, logprobs: Tensor) -> Tensor:
    """Returns weight · logp, 0 where the weight is: p log p → 0 as p → 0, 0 · −inf is not."""
    return weight * logprobs.masked_fill(weight == 0, 0)
