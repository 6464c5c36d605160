"""SAPO's policy term has a soft gate on the ratio where PPO's has a clip; terms.py has the notation.

value     −(4/τ) · σ(τ(r − 1)) · A       τ by the sign of A
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tokens import Tokens, given
from .ratios import log_ratio

if TYPE_CHECKING:
    from ..objective import Objective

__all__ = ["slope", "value"]


def _gate(o: Objective, t: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (τ, r, σ(τ(r − 1))) [n]."""
    # Beyond 80 the gate is 1 and flat; an overflown r would make the backward 0 · ∞.
    r = log_ratio(t).clamp(max=80).exp()
    tau = torch.where(given(t.advantages) > 0, torch.full_like(r, o.sapo_tau_pos), torch.full_like(r, o.sapo_tau_neg))
    return tau, r, torch.sigmoid(tau * (r - 1))


def value(o: Objective, t: Tokens) -> Tensor:
    tau, _, gate = _gate(o, t)
    return -4 / tau * gate * given(t.advantages)


def slope(o: Objective, t: Tokens) -> Tensor:
    _, r, gate = _gate(o, t)
    return -4 * gate * (1 - gate) * r * given(t.advantages)
