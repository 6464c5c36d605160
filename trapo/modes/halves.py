"""One adapter is two here: the first half of its ranks, θ, and the others, w. B A = B_θ A_θ + B_w A_w."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from trapo.errors import TrapoError
from trapo.modes.mixing import Gradient

if TYPE_CHECKING:
    from trapo.learner import Learner


def halves_of(learner: Learner) -> list[torch.Tensor]:
    """Returns for each parameter of the adapter 1 where it is θ's and 0 where it is w's, in a shape that spreads."""
    from trapo.models.lora import ADAPTER

    rank, halves = int(learner.model.peft_config[ADAPTER].r), []  # type: ignore[attr-defined]
    for name, p in learner.model.named_parameters():
        if p.requires_grad:
            place = 0 if ".lora_A." in name else 1
            if p.ndim != 2 or p.shape[place] != rank:
                raise TrapoError(f"lora.targets: mode bridge halves the ranks of linear layers; got {name}")
            half = (torch.arange(rank, device=p.device) < rank - rank // 2).to(p.dtype)
            halves.append(half[:, None] if place == 0 else half[None])
    return halves


def half_of(gradient: Gradient | None, halves: list[torch.Tensor]) -> list[torch.Tensor | None] | None:
    """Returns a gradient's part in the half that is 1."""
    if gradient is None:
        return None
    return [None if g is None else g * half for g, half in zip(gradient, halves, strict=True)]


@contextmanager
@torch.no_grad()
def in_place(
    parameters: Sequence[torch.nn.Parameter], alone: Sequence[torch.Tensor], halves: list[torch.Tensor]
) -> Iterator[None]:
    """Puts θ̂ into θ's place."""
    before = [p.detach().clone() for p in parameters]
    for p, value, half in zip(parameters, alone, halves, strict=True):
        p.copy_(torch.where(half > 0, value, p))
    try:
        with torch.enable_grad():
            yield
    finally:
        for p, value in zip(parameters, before, strict=True):
            p.copy_(value)
