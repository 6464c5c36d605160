"""This file computes statistics of a row of logits beside those that every loss needs: computed where an objective or a
caller asks.

    top{k}_mass      Σ π over the k likeliest classes
    top{k}_entropy   entropy of π restricted to the k likeliest classes and renormalised, nats
    sum_sq           Σ π²
    argmax_match     1 where the target is the likeliest class (the first of them), else 0
    mean_logit       mean of z over the vocabulary

None of them has a gradient. They are read off the chunk of logits between the row kernel's verbs, in plain torch and
whatever the backend: one more pass each (top-k: a selection), block by block over one scratch block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .arguments.scalars import shown
from .backends.base import RowStats, stats_dtype
from .chunks.buffers import block_rows

__all__ = ["Collector", "check_statistics", "is_statistic", "row_statistics", "sed_threshold"]

_TOP = re.compile(r"top([1-9]\d{0,5})_(mass|entropy)")
_FIXED = ("sum_sq", "argmax_match", "mean_logit")


def is_statistic(name: str) -> bool:
    return name in _FIXED or _TOP.fullmatch(name) is not None


def check_statistics(caller: str, names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names, without repetition."""
    accepted = "'top20_mass', 'top20_entropy' (any k), " + ", ".join(map(repr, _FIXED))
    if not isinstance(names, (str, list, tuple, set, frozenset, dict)):
        raise TypeError(f"{caller}: statistics must be a sequence of names among {accepted}; got {shown(names)}")
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if not isinstance(name, str) or not is_statistic(name):
            raise ValueError(f"{caller}: statistics must be among {accepted}; got {shown(name)}")
    return tuple(dict.fromkeys(names))


def sed_threshold(masses: Tensor, share: float = 0.7) -> float:
    """Returns τ of SED-SFT read off data: this share of the tokens has at least that mass on its k likeliest classes.

    masses [...]: "top{k}_mass" of held-out expert tokens, by `linear_statistics`. The authors' script takes a share of
    0.7. Raises ValueError where there is no token, or share is not in (0, 1].

    Example:
        >>> masses = torch.tensor([0.25, 0.5, 0.75, 1.0])      # of four tokens
        >>> sed_threshold(masses, share=0.5)
        0.75
    """
    if masses.numel() == 0 or not 0 < share <= 1:
        raise ValueError(f"sed_threshold: needs tokens and a share in (0, 1]; got {masses.numel()} and {shown(share)}")
    ordered = masses.flatten().sort(descending=True).values
    return float(ordered[max(1, round(share * ordered.numel())) - 1])


def row_statistics(
    names: Iterable[str], shifted: Tensor, targets: Tensor, top: Tensor, log_sum: Tensor
) -> dict[str, Tensor]:
    """Returns `names` of rows of logits, given as z − max z [n, V] in the statistics' dtype, soft-cap applied, with max
    z [n] and log Σ e^(z − max z) [n]."""
    return {name: _one(name, shifted, targets, top, log_sum) for name in names}


def _one(name: str, shifted: Tensor, targets: Tensor, top: Tensor, log_sum: Tensor) -> Tensor:
    if name == "sum_sq":
        return ((shifted - log_sum[:, None]) * 2).exp().sum(1)
    if name == "argmax_match":
        return (shifted.argmax(1) == targets).to(shifted.dtype)
    if name == "mean_logit":
        return shifted.mean(1) + top
    found = _TOP.fullmatch(name)
    assert found is not None
    largest = shifted.topk(min(int(found[1]), shifted.shape[1]), 1, sorted=False).values
    if found[2] == "mass":
        return (largest - log_sum[:, None]).exp().sum(1)
    log_p = largest.log_softmax(1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(1)


class Collector:
    """Collects the statistics `names` of compact rows [n], filled in chunk by chunk by the stream."""

    def __init__(self, names: tuple[str, ...], rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = {name: torch.empty(rows, dtype=dtype, device=device) for name in names}

    def scratch_bytes(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        """Returns the bytes of a block of z, of one of what is computed from it, and of what a top-k selection
        takes."""
        if not self.values:
            return 0
        return block_rows(vocab, device) * vocab * (2 * stats_dtype(dtype).itemsize + 8)

    def take(self, at: slice, logits: Tensor, targets: Tensor, stats: RowStats, cap: float | None) -> None:
        """Takes the statistics of compact rows `at`, whose logits [C, V] the stream holds; targets and stats are those
        of the chunk."""
        if not self.values:
            return
        for rows in _row_blocks(logits):
            z = logits[rows].to(stats.max.dtype)
            if cap is not None:
                z = z.div(cap).tanh_().mul_(cap)
            if logits.dtype != z.dtype:  # the target's logit is known better than from what is rounded
                z.scatter_(1, targets[rows][:, None], stats.target_logits[rows][:, None])
            shifted = z - stats.max[rows][:, None]
            found = row_statistics(self.values, shifted, targets[rows], stats.max[rows], stats.log_sum[rows])
            for name, values in found.items():
                self.values[name][at][rows] = values

    def at(self, rows: slice) -> dict[str, Tensor]:
        return {name: values[rows] for name, values in self.values.items()}


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    step = block_rows(logits.shape[1], logits.device)
    for start in range(0, logits.shape[0], step):
        yield slice(start, min(start + step, logits.shape[0]))
