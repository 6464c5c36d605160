"""The oracle: all logits at once, plain autograd, any float dtype. Correct by being short; never picked by itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .head import Head
from .rows.base import stats_dtype

__all__ = ["linear_logits", "token_logprobs"]


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """h Wᵀ + b [n, V], widened to the statistics' dtype: an oracle does not round its logits."""
    wide = stats_dtype(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


def token_logprobs(logits: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """(log π(y) [n], H [n]) of logits [n, V] as the head gives them, before scale and soft-cap."""
    z = logits.to(stats_dtype(logits.dtype)) * head.scale
    if head.cap is not None:
        z = head.cap * torch.tanh(z / head.cap)
    log_pi = F.log_softmax(z, dim=-1)
    # π log π → 0 as π → 0; filled before the product, whose backward would be 0 · −inf.
    entropy = -(log_pi.exp() * log_pi.masked_fill(log_pi == -torch.inf, 0)).sum(-1)
    return log_pi.gather(-1, targets[:, None]).squeeze(-1), entropy
