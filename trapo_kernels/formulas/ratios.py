"""This file has the ratios of the policy to others, and where a clip cuts them: what the terms and the metrics both
need.

r = exp(logp − old_logp) is the ratio, A the advantage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tokens import Tokens, given

if TYPE_CHECKING:
    from ..objective import Objective

__all__ = [
    "beyond_divergence",
    "clipped",
    "clipped_where",
    "k3",
    "kept_sequences",
    "log_of_clipped_ratio",
    "log_ratio",
    "outside_clip",
    "possible",
    "probability",
    "ratio_unless",
    "tis_fields",
    "tis_is_a_cap",
    "tis_weight",
    "weighs_sequences",
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
    if o.policy in ("dppo_tv", "dppo_kl"):
        low, high = beyond_divergence(o, t)
        return low, high, torch.zeros_like(low)
    return clipped_where(o, t, log_of_clipped_ratio(o, t))


def beyond_divergence(o: Objective, t: Tokens) -> tuple[Tensor, Tensor]:
    """Returns where DPPO takes the gradient away [n]: too far below the old policy (A <= 0), too far above (A > 0)."""
    logprobs, advantages = t.logprobs.detach(), given(t.advantages)
    old = logprobs if t.old_logprobs is None else t.old_logprobs
    p, mu = logprobs.exp(), old.exp()
    far = p - mu
    if o.policy == "dppo_kl":
        own = (mu * (possible(old) - logprobs)).masked_fill(mu == 0, 0)
        kl = own + (1 - mu) * torch.log((1 - mu + 1e-8) / (1 - p + 1e-8))
        far = torch.where(p > mu, kl, -kl)
    none = torch.zeros_like(far, dtype=torch.bool)
    return (
        none if o.clip_low is None else (advantages <= 0) & (far < -o.clip_low),
        none if o.clip_high is None else (advantages > 0) & (far > o.clip_high),
    )


def clipped_where(o: Objective, t: Tokens, log_r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return outside_clip(log_r.detach().exp(), given(t.advantages), o.clip_low, o.clip_high, o.dual_clip)


def k3(difference: Tensor) -> Tensor:
    """Returns e^d − 1 − d [n], of a difference of log-probabilities."""
    # Beyond 80 the exponential has absorbed the rest; unclamped, inf − inf would be NaN at d = inf.
    return torch.expm1(difference) - difference.clamp(max=80)


def tis_fields(o: Objective) -> tuple[str, ...]:
    """Returns the fields that can change the weight."""
    more = ("tis_low", "tis_mode", "tis_level") if o.tis_cap is not None else ()
    return ("tis_cap", "off_policy_mask", *more)


def weighs_sequences(o: Objective) -> bool:
    """Returns whether the weight of a token's policy term depends on others of its sequence."""
    of_tis = o.tis_cap is not None and o.tis_level == "sequence"
    return o.has_policy_term and (of_tis or o.off_policy_mask is not None)


def tis_is_a_cap(o: Objective) -> bool:
    """Returns whether the weight is a token's ratio with a cap, or none: what kernels know."""
    plain = o.tis_cap is None or (o.tis_low, o.tis_mode, o.tis_level) == (None, "clip", "token")
    return plain and o.off_policy_mask is None


def tis_weight(o: Objective, t: Tokens) -> Tensor:
    """Returns sg(min(π_old / π_rollout, C)) [n]: truncated importance sampling of the engine that sampled the tokens; 0
    where π_old is, whatever π_rollout."""
    old = (t.logprobs if t.old_logprobs is None else t.old_logprobs).detach()
    log_weight, cap = old - given(t.rollout_logprobs), o.tis_cap
    assert cap is not None
    if o.tis_level == "sequence":
        assert t.sequences is not None
        inside = torch.where(t.own_tokens & (old != -torch.inf), log_weight, 0)
        log_weight = t.sequences.total(inside)
    weight = log_weight.exp()
    if o.tis_mode == "mask":
        outside = weight > cap if o.tis_low is None else (weight > cap) | (weight < o.tis_low)
        weight = weight.masked_fill(outside, 0)
    else:
        weight = weight.clamp(min=o.tis_low, max=cap)
    return weight.masked_fill(old == -torch.inf, 0)


def kept_sequences(o: Objective, t: Tokens) -> Tensor:
    """Returns 0 where A < 0 and the sequence has gone too far from what sampled it, else 1 [n]: the mean of
    log π_sampled / π over its own tokens is above the bound. A token whose difference is no number says nothing."""
    sampled = t.old_logprobs if t.rollout_logprobs is None else t.rollout_logprobs
    advantages, logprobs = given(t.advantages), t.logprobs.detach()
    if sampled is None:  # the policy itself
        return torch.ones_like(logprobs)
    assert t.sequences is not None
    assert o.off_policy_mask is not None
    inside = t.own_tokens
    drift = torch.where(inside, (sampled - logprobs).nan_to_num(nan=0), 0)
    mean = t.sequences.total(drift) / t.sequences.total(inside.to(drift.dtype)).clamp(min=1)
    return ((advantages >= 0) | (mean <= o.off_policy_mask)).to(logprobs.dtype)


def weighted(weight: Tensor, logprobs: Tensor) -> Tensor:
    """Returns weight · logp, 0 where the weight is: p log p → 0 as p → 0, 0 · −inf is not."""
    return weight * logprobs.masked_fill(weight == 0, 0)
