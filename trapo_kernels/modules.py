"""The losses as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .functional import PolicyLoss, linear_policy_loss
from .objective import Objective

__all__ = ["TrapoLoss"]


class TrapoLoss(nn.Module):
    """`linear_policy_loss` with its objective and head options held: `TrapoLoss(Objective.trapo(), temperature=0.6)`.

    Args:
        objective: the terms.
        **options: any keyword argument of `linear_policy_loss`, the same at every call (temperature, softcap,
            logit_scale, ignore_index, backend, skip_inactive, ...).
    """

    def __init__(self, objective: Objective, **options: Any) -> None:
        super().__init__()
        self.objective = objective
        self.options = options

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **inputs: Any) -> PolicyLoss:
        """Arguments and errors of `linear_policy_loss`, less the objective."""
        return linear_policy_loss(hidden, weight, targets, self.objective, **{**self.options, **inputs})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.objective), *(f"{name}={value!r}" for name, value in self.options.items())])
