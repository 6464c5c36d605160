"""`TrapoLoss` holds an objective and head options, as a module among others."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from .arguments import validate
from .backends.dispatch import check_backend
from .batch import PolicyLoss
from .functional import linear_policy_loss
from .objective import Objective
from .statistics import check_statistics

__all__ = ["TrapoLoss"]

_HEAD = ("temperature", "softcap", "logit_scale", "ignore_index")
_GIVEN = ("hidden", "weight", "targets", "objective")
_OPTIONS = tuple(name for name in inspect.signature(linear_policy_loss).parameters if name not in _GIVEN)


class TrapoLoss(nn.Module):
    """Is `linear_policy_loss` with its objective and head options held: `TrapoLoss(Objective.trapo(),
    temperature=0.6)`.

    Args:
        objective: the terms.
        **options: any keyword argument of `linear_policy_loss`, the same at every call (temperature, softcap,
            logit_scale, ignore_index, backend, skip_inactive, ...).

    Raises:
        TypeError, ValueError: an option that there is not, or out of its range; the message names it.

    Example:
        >>> loss = TrapoLoss(Objective.sft(), temperature=0.6)
        >>> hidden, head = torch.randn(3, 8, requires_grad=True), torch.nn.Linear(8, 100, bias=False)
        >>> loss(hidden, head.weight, torch.tensor([5, 7, -100])).metrics["tokens"]
        tensor(2)
    """

    def __init__(self, objective: Objective, **options: Any) -> None:
        super().__init__()
        _check_options(objective, options)
        self.objective = objective
        self.options = options

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **inputs: Any) -> PolicyLoss:
        """Takes the arguments of `linear_policy_loss`, less the objective, and raises its errors."""
        return linear_policy_loss(hidden, weight, targets, self.objective, **{**self.options, **inputs})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.objective), *(f"{name}={value!r}" for name, value in self.options.items())])


def _check_options(objective: Any, options: dict[str, Any]) -> None:
    """Checks what can be checked before there are tensors."""
    caller = "TrapoLoss"
    if not isinstance(objective, Objective):
        raise TypeError(f"{caller}: objective must be an Objective; got {type(objective).__name__}")
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"{caller}: options must be among {', '.join(_OPTIONS)}; got {name!r}")
    validate.check_head(caller, **{name: options[name] for name in _HEAD if name in options})
    validate.check_grad_tolerance(caller, options.get("grad_tolerance", 0.0))
    validate.check_flag(caller, "skip_inactive", options.get("skip_inactive", False))
    check_statistics(caller, options.get("statistics", ()))
    check_backend(caller, options.get("backend"))
