"""DPPO (arXiv 2602.04879) clips where the policy is far from the old one, not where their ratio is: verl's dppo_tv and
dppo_kl, prime-rl's mask. terms.py has the notation; μ is the old probability of the token.

    dppo_tv   valid: p − μ <= clip_high for A > 0, p − μ >= −clip_low else
    dppo_kl   the same with the binary KL(μ ‖ p) of the token against all others, on that side of μ
    value     −sg(min(r, dppo_cap) · valid) · A · log p
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tokens import Tokens, given
from .ratios import beyond_divergence, log_ratio, possible

if TYPE_CHECKING:
    from ..objective import Objective

__all__ = ["SOURCES", "slope", "value"]

SOURCES = {
    "tv": "DPPO, total variation (arXiv 2602.04879; verl): −sg(min(r, cap)·1[p − μ inside])·A·log p",
    "kl": "DPPO, binary KL (arXiv 2602.04879; verl): −sg(min(r, cap)·1[KL inside])·A·log p",
}


def _weight(o: Objective, t: Tokens) -> Tensor:
    """Returns min(r, dppo_cap) · A where the token is valid, else 0 [n]."""
    advantages, low, high = given(t.advantages), *beyond_divergence(o, t)
    counts = (advantages != 0) & ~low & ~high
    r = log_ratio(t).detach().masked_fill(~counts, 0).exp()
    r = r if o.dppo_cap is None else r.clamp(max=o.dppo_cap)
    return torch.where(counts, r * advantages, 0)


def value(o: Objective, t: Tokens) -> Tensor:
    return -_weight(o, t) * possible(t.logprobs)


def slope(o: Objective, t: Tokens) -> Tensor:
    return -_weight(o, t)
