"""Supports may come unpadded, as (ids [M], offsets [N + 1]), where those of token i are ids[offsets[i] : offsets[i +
1]]. Padded to the widest, one token with half of the vocabulary would cost all others as much."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..arguments.scalars import shown

__all__ = ["of_similar_size"]

# Padded to the most of its group, a support takes at most so many times what it has, and so many ids.
_GROWTH, _LEAST = 4, 16


def of_similar_size(caller: str, support: Any, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (some tokens [n], the ids of each [n, K], -1 for none) until all were there. Their sizes are read, for
    which a device is waited for.

    Raises:
        TypeError, ValueError: it is no support of these tokens [...].
    """
    ids, offsets = _checked(caller, support, tokens)
    sizes = offsets.diff()
    most, widest, done = _LEAST, int(sizes.max()) if sizes.numel() else 0, -1
    while done < widest:
        rows = ((sizes > done) & (sizes <= most)).nonzero().squeeze(1)
        if rows.numel():
            width = torch.arange(int(sizes[rows].max()), device=ids.device)
            there = width < sizes[rows][:, None]
            place = torch.where(there, offsets[rows][:, None] + width, 0)
            # Of tokens without an id there is no place to look at.
            yield rows, ids[place].masked_fill(~there, -1) if ids.numel() else place
        done, most = most, most * _GROWTH


def _checked(caller: str, support: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ids [M] and offsets [N + 1]."""
    if len(support) != 2 or not all(isinstance(t, Tensor) and t.dtype == torch.int64 for t in support):
        raise TypeError(
            f"{caller}: support must be ids [..., K] or (ids [M], offsets [N + 1]), int64; got {shown(support)}"
        )
    ids, offsets = support
    count = tokens.numel()
    if ids.ndim != 1 or offsets.shape != (count + 1,):
        got = f"{list(ids.shape)} and {list(offsets.shape)}"
        raise ValueError(f"{caller}: support must have ids [M] and offsets [{count + 1}] for {count} tokens; got {got}")
    if ids.device != tokens.device or offsets.device != tokens.device:
        got = f"{ids.device} and {offsets.device}"
        raise ValueError(f"{caller}: support must be on the device of targets, {tokens.device}; got {got}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != ids.numel() or bool((offsets.diff() < 0).any()):
        raise ValueError(f"{caller}: support must have offsets that rise from 0 to M={ids.numel()}; got others")
    return ids, offsets
