"""This row kernel is in plain torch, for any device: statistics and in-place gradient of a chunk of logits.

    stats:  m = max z, Σ e^(z−m) without one column at m, Σ e^(z−m)(z−m), z_y       (fp32; fp64 for fp64)
    grad_:  dx_j = [g_lp (1[j=y] − π_j) − g_H π_j (log π_j + H)] · (1 − (z_j/cap)²)

Passes over memory: stats reads each logit once, grad_ reads and writes it once, as long as a block of rows stays
in cache: the elementwise passes (7 and 6, of one exp each; a tanh more with a soft-cap) run block by block over two
reused scratch blocks (chunks/buffers.py), which are all that is allocated.
FLOPs: about 7 + 6 per logit and two exps, against 6·D per logit in the GEMMs around it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..chunks.buffers import block_rows
from .base import RowKernel, RowState, RowStats, stats_dtype

# e^-1e4 is 0 in fp64 too, so raising z − m to this changes nothing but 0 · −inf, which becomes 0.
_FLOOR = -1e4


def scratch_bytes(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    return 2 * block_rows(vocab, device) * vocab * stats_dtype(dtype).itemsize


def _blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields (rows, two scratch blocks [rows, V]) over all rows; the scratch is reused."""
    rows, vocab = logits.shape
    step = max(1, min(block_rows(vocab, logits.device), rows))
    scratch = logits.new_empty(2, step, vocab, dtype=stats_dtype(logits.dtype))
    for start in range(0, rows, step):
        size = min(step, rows - start)
        yield slice(start, start + size), scratch[0, :size], scratch[1, :size]


def _cap(x: Tensor, cap: float | None) -> Tensor:
    """Returns z of a few logits."""
    return x if cap is None else cap * torch.tanh(x / cap)


def _shift(x: Tensor, top: Tensor, cap: float | None, out: Tensor) -> Tensor:
    """Writes z − m of a block to `out`."""
    if cap is None:
        return torch.sub(x, top, out=out)
    return out.copy_(x).div_(cap).tanh_().mul_(cap).sub_(top)


def stats(logits: Tensor, targets: Tensor, cap: float | None, entropy: bool) -> RowState:
    rows, dtype = logits.shape[0], stats_dtype(logits.dtype)
    top, rest = logits.new_empty(rows, 1, dtype=dtype), logits.new_empty(rows, dtype=dtype)
    dot = logits.new_empty(rows, dtype=dtype) if entropy else None
    for at, first, e in _blocks(logits):
        # The soft-cap is monotone, so the maximum is taken before it.
        largest, column = logits[at].max(1, keepdim=True)
        top[at] = _cap(largest.to(dtype), cap)
        d = _shift(logits[at], top[at], cap, out=first)
        torch.exp(d, out=e).scatter_(1, column, 0)
        torch.sum(e, 1, out=rest[at])
        if dot is not None:
            torch.sum(d.clamp_(min=_FLOOR).mul_(e), 1, out=dot[at])
    target = _cap(logits.gather(1, targets[:, None]).squeeze(1).to(dtype), cap)
    return RowState(top.squeeze(1), rest, dot, target)


def grad_(
    logits: Tensor,
    targets: Tensor,
    stats: RowStats,
    g_lp: Tensor,
    g_entropy: Tensor | None,
    cap: float | None,
) -> None:
    # With d = z − m and π = e^d / Σ:  dz_j = e^(d_j) (slope · d_j + constant) + g_lp 1[j=y]
    constant, slope = -g_lp, None
    at_target = -g_lp * torch.expm1(stats.logprobs)  # g_lp (1 − π_y), without its cancellation
    if g_entropy is not None:
        assert stats.entropy is not None
        constant = constant - g_entropy * (stats.entropy - stats.log_sum)
        slope = (-g_entropy * torch.exp(-stats.log_sum))[:, None]
        log_p = stats.logprobs.clamp(min=_FLOOR)
        at_target = at_target - g_entropy * log_p.exp() * (log_p + stats.entropy)
    constant = (constant * torch.exp(-stats.log_sum))[:, None]
    index, at_target, top = targets[:, None], at_target[:, None], stats.max[:, None]
    in_place = cap is None and logits.dtype == top.dtype
    for at, first, e in _blocks(logits):
        x = logits[at]
        d = _shift(x, top[at], cap, out=x if in_place else first)
        torch.exp(d, out=e)
        if slope is None:
            dz = torch.mul(e, constant[at], out=d)
        else:
            dz = d.clamp_(min=_FLOOR).mul_(slope[at]).add_(constant[at]).mul_(e)
        dz.scatter_(1, index[at], at_target[at])
        if cap is not None:  # dz/dx = 1 − tanh²(x / cap)
            dz.addcmul_(dz, e.copy_(x).div_(cap).tanh_().square_(), value=-1)
        if not in_place:
            x.copy_(dz)


KERNEL = RowKernel(stats, grad_, scratch_bytes)
