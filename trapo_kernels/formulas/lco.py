"""LCO's expert terms move the target's logit towards z_y + A/β'; terms.py has the notation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tokens import Tokens, given
from .ratios import weighted

if TYPE_CHECKING:
    from ..objective import Objective

_MOST = 1e30  # of a factor that overflows


def _step(o: Objective, t: Tokens) -> Tensor:
    """Returns A/β' [n], by which LCO wants the target's logit to move; β' = β for A > 0, else lco_neg · β."""
    advantages = given(t.advantages)
    return torch.where(advantages > 0, advantages / o.lco_beta, advantages / (o.lco_neg * o.lco_beta))


def _miss(o: Objective, t: Tokens) -> Tensor:
    """Returns z_y − sg(z_y + A/β') = −A/β', with the gradient of z_y."""
    z = given(t.target_logits)
    z = z.masked_fill(z == -torch.inf, 0)  # ∞ − ∞
    return (z - z.detach()) - _step(o, t)


def mse_value(o: Objective, t: Tokens) -> Tensor:
    return _miss(o, t).square()


def _where_possible(slope: Tensor, t: Tokens) -> Tensor:
    """Returns the slope, 0 where a bias of −inf removes the column: its logit has none."""
    return slope.masked_fill(given(t.target_logits) == -torch.inf, 0)


def mse_slope(o: Objective, t: Tokens) -> Tensor:
    return _where_possible(2 * _miss(o, t).detach(), t)


def logcosh_value(o: Objective, t: Tokens) -> Tensor:
    miss = _miss(o, t)
    return torch.logaddexp(miss, -miss) - math.log(2)  # log cosh, without its overflow


def logcosh_slope(o: Objective, t: Tokens) -> Tensor:
    return _where_possible(torch.tanh(_miss(o, t).detach()), t)


def _kld_weight(o: Objective, t: Tokens) -> Tensor:
    """Returns (q − p)/(1 − p) [n], where q is the probability of the target once its logit under π_old has moved by
    A/β'."""
    step, logprobs = _step(o, t), t.logprobs.detach()
    old = logprobs if t.old_logprobs is None else t.old_logprobs.clamp(max=0)
    # (1 − q)/(1 − p) = (1 − p_old)/(1 − p) / (1 + p_old (e^step − 1)); of a step that overflows it is 0.
    left = torch.expm1(old) / torch.expm1(logprobs)
    left = torch.where(old == logprobs, 1, left).clamp(max=_MOST)  # p = 1 has no gradient, whatever its slope
    return 1 - left / (1 + old.exp() * torch.expm1(step.clamp(max=math.log(_MOST))))


def kld_value(o: Objective, t: Tokens) -> Tensor:
    return -weighted(_kld_weight(o, t), t.logprobs)


def kld_slope(o: Objective, t: Tokens) -> Tensor:
    return -_kld_weight(o, t)
