"""A temperature of each token is taken into the hidden states here: (h / τ) Wᵀ is h Wᵀ / τ, so that no kernel knows of
it.

That is so where nothing stands between the product and the division: no bias, no soft-cap. The hidden states are
divided in fp32 and rounded to their dtype once more, which 16-bit ones have been already: half a unit in the last place
of each factor of a logit, an error that grows like that of the product itself, not with V. fp32 loses nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..head import Head
from .scalars import shown
from .validate import can_look, check_head

__all__ = ["head_of", "into_hidden", "of_tokens"]


def of_tokens(temperature: Any) -> Tensor | None:
    """Returns the tensor with a number for each token, or sequence, where there is one."""
    return temperature if isinstance(temperature, Tensor) and temperature.ndim > 0 else None


def head_of(caller: str, hidden: Any, temperature: Any, bias: Any, *, softcap: Any, **others: Any) -> tuple[Any, Head]:
    """Returns (hidden states that are divided by a temperature of each token; the head with what is left).

    Raises:
        TypeError, ValueError: as `into_hidden`, or an option of the head is out of its range.
    """
    hidden, left = into_hidden(caller, hidden, temperature, bias, softcap)
    return hidden, check_head(caller, temperature=left, softcap=softcap, **others)


def into_hidden(
    caller: str, hidden: Any, temperature: Any, bias: Any, softcap: Any, name: str = "temperature"
) -> tuple[Any, Any]:
    """Returns (hidden states, the number that is left of the temperature); both as they are where it is a number.

    Raises:
        TypeError, ValueError: a tensor of another shape, with a bias or soft-cap, or (on a CPU) not above 0.
    """
    if of_tokens(temperature) is None or not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        return hidden, temperature
    for what, value in (("bias", bias), ("softcap", softcap)):
        if value is not None:
            raise ValueError(
                f"{caller}: {name} must be a number where there is a {what}, which stands between the product and the "
                f"division; got {shown(temperature)}"
            )
    tokens = hidden.shape[:-1]
    if not temperature.is_floating_point() or temperature.device != hidden.device:
        got = f"{temperature.dtype} on {temperature.device}"
        raise TypeError(f"{caller}: {name} must be floating on {hidden.device}, as hidden; got {got}")
    per_sequence = tokens[:-1] if len(tokens) > 1 else None
    if temperature.shape == per_sequence:
        temperature = temperature[..., None]
    elif temperature.shape not in (tokens, (*tokens[:-1], 1)):
        raise ValueError(
            f"{caller}: {name} must be a number, {list(tokens)} as tokens, or one per sequence; "
            f"got {shown(temperature)}"
        )
    wide = torch.promote_types(hidden.dtype, torch.float32)
    each = temperature.detach().to(wide)
    right = (each > 0) & (each < torch.inf)
    if can_look(each):
        if not bool(right.all()):
            worst = each[~right].flatten()[0].item()
            raise ValueError(f"{caller}: {name} must be finite and above 0 at every token; got {worst:g}")
    else:
        each = torch.where(right, each, torch.nan)
    return (hidden.to(wide) / each[..., None]).to(hidden.dtype), 1.0
