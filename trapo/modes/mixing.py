"""Gradients of a model are added and compared here: lists with an entry a parameter, None where there is none."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Gradient = Sequence[torch.Tensor | None]


def combined(*parts: tuple[float, Gradient | None]) -> list[torch.Tensor | None] | None:
    """Returns Σ weight · gradient over the parts that there are; None where there is none of them."""
    given = [(weight, gradient) for weight, gradient in parts if gradient is not None]
    if not given:
        return None
    rows = zip(*(gradient for _, gradient in given), strict=True)
    return [_sum([(w, g) for (w, _), g in zip(given, row, strict=True) if g is not None]) for row in rows]


def _sum(parts: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor | None:
    total = None
    for weight, gradient in parts:
        total = gradient * weight if total is None else total.add_(gradient, alpha=weight)
    return total


def minus(a: Gradient | None, b: Gradient | None) -> list[torch.Tensor | None] | None:
    """Returns a − b, where a missing one is 0."""
    return combined((1.0, a), (-1.0, b))


def inner(a: Gradient, b: Gradient) -> float:
    """Returns the inner product over all parameters, in float64."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return sum(float((x.double() * y.double()).sum()) for x, y in pairs)
