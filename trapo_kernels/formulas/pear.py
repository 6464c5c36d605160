"""This file is PEAR's weight: how much likelier the policy makes what follows a token than the trace's writer did.

    G = γ^n · exp Σ clip(logp_j − logπ_β,j)      log G clipped once more; terms.py has the notation

over the n later expert tokens of the sequence (`token`); over those behind the token's block, which has one G
(`block`); over all of the sequence, without γ (`sequence`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tokens import Sequences, Tokens
from .ratios import log_ratio, weighted

if TYPE_CHECKING:
    from ..objective import Objective

LEVELS = ("token", "block", "sequence")


def idle_fields(o: Objective) -> set[str]:
    """Returns the fields of PEAR that change nothing at its level."""
    return {"token": {"pear_block"}, "block": set[str](), "sequence": {"pear_block", "pear_gamma"}}[o.pear_level]


def _weight(o: Objective, t: Tokens) -> Tensor:
    """Returns G [n]."""
    assert t.sequences is not None
    inside = t.expert.to(t.logprobs.dtype)
    steps = log_ratio(t).detach().clamp(o.pear_low, o.pear_high) * inside
    # One exponential: of two factors one may underflow where the other overflows.
    if o.pear_level == "sequence":
        exponent = t.sequences.total(steps)
    else:
        later, count = t.sequences.later(steps), t.sequences.later(inside)
        if o.pear_level == "block":
            rest = _blocks(o.pear_block, t, count)
            later, count = later - rest.later(steps), count - rest.later(inside)
        exponent = count * math.log(o.pear_gamma) + later
    return exponent.clamp(o.pear_floor, o.pear_ceil).exp()


def _blocks(size: int, t: Tokens, later: Tensor) -> Sequences:
    """Returns each block of so many expert tokens as a sequence of its own. later: how many follow a token [n]."""
    assert t.sequences is not None
    inside = t.expert.long()
    place = t.sequences.total(inside) - later.round().long() - 1  # among the expert tokens of its sequence, from 0
    block = torch.div(place.clamp(min=0), size, rounding_mode="floor")
    return Sequences.of(torch.where(t.expert, t.sequences.row * t.logprobs.numel() + block, -1))


def value(o: Objective, t: Tokens) -> Tensor:
    return -weighted(_weight(o, t), t.logprobs)


def slope(o: Objective, t: Tokens) -> Tensor:
    return -_weight(o, t)
