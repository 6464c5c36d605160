"""The oracle computes all logits at once, by plain autograd, in any float dtype. It is right by being short, and is
never picked by itself."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments.graph import tracing
from .backends.base import stats_dtype
from .head import Head
from .statistics import row_statistics

__all__ = ["TokenValues", "linear_logits", "token_values"]


class TokenValues(NamedTuple):
    """Holds what a loss is a function of [n]: log π(y), H, z_y (None where not asked for) and statistics of the row."""

    logprobs: Tensor
    entropy: Tensor | None
    target_logits: Tensor | None
    statistics: dict[str, Tensor]


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns h Wᵀ + b [n, V], widened to the statistics' dtype: an oracle does not round its logits."""
    wide = stats_dtype(hidden.dtype)
    if tracing():
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    logits: Tensor = _Product.apply(hidden.to(wide), weight.to(wide).t())
    return logits if bias is None else logits + bias.to(wide)


class _Product(torch.autograd.Function):
    """Computes a b, in their dtype inside torch.autocast too, and so its derivatives, of any order, wherever taken."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        return _Product.apply(grad, b.t()) if needs_a else None, _Product.apply(a.t(), grad) if needs_b else None

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None) -> Tensor:
        a, b = ctx.saved_tensors
        parts = [_Product.apply(*pair) for pair in ((da, b), (a, db)) if all(t is not None for t in pair)]
        return sum(parts[1:], parts[0])


def token_values(logits: Tensor, targets: Tensor, head: Head, statistics: tuple[str, ...] = ()) -> TokenValues:
    """Computes all values of logits [n, V] as the head gives them, before scale and soft-cap."""
    z = logits.to(stats_dtype(logits.dtype)) * head.scale
    if head.cap is not None:
        z = head.cap * torch.tanh(z / head.cap)
    log_pi = F.log_softmax(z, dim=-1)
    # π log π → 0 as π → 0; filled before the product, whose backward would be 0 · −inf.
    entropy = -(log_pi.exp() * log_pi.masked_fill(log_pi == -torch.inf, 0)).sum(-1)
    logprobs, target = (values.gather(-1, targets[:, None]).squeeze(-1) for values in (log_pi, z))
    likeliest = log_pi.detach().argmax(-1, keepdim=True)
    leads = log_pi.detach().gather(-1, likeliest).squeeze(-1) > _HALF
    led_logprobs, led_entropy = _with_a_leader(z, targets, likeliest.squeeze(-1))
    logprobs, entropy = torch.where(leads, led_logprobs, logprobs), torch.where(leads, led_entropy, entropy)
    with torch.no_grad():
        found = _statistics(z, targets, statistics) if statistics else {}
    return TokenValues(logprobs, entropy, target, found)


# log ½. A class of more than half of the mass is a row's only one.
_HALF = math.log(0.5)


def _with_a_leader(z: Tensor, targets: Tensor, leader: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (log π(y), H) [n] of logits z [n, V], where a class leads [n]: from what the others have beside it, which
    is lost in 1 − π once that is below the rounding of 1."""
    column = leader[:, None]
    d = (z - z.gather(-1, column)).scatter(-1, column, -torch.inf)
    e = d.exp()
    rest = e.sum(-1)
    log_sum = rest.log1p()
    below = (e * d.masked_fill(d == -torch.inf, 0)).sum(-1)
    # Of the leader itself this is 0, and its derivatives cancel, but beside theirs those of the rest lose their digits.
    gap = d.gather(-1, targets[:, None]).squeeze(-1).masked_fill(targets == leader, 0)
    return gap - log_sum, log_sum - below / (1 + rest)


def _statistics(z: Tensor, targets: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    top = z.amax(-1)
    shifted = z - top[:, None]
    rest = shifted.exp().scatter(-1, z.argmax(-1, keepdim=True), 0).sum(-1)
    return row_statistics(names, shifted, targets, top, rest.log1p())
