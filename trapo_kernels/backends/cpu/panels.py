"""This is the chunk loop of stream.py for fp32 heads on a CPU, with softmax and GEMMs interleaved panel by panel in C++
(csrc/cpu/panels.cpp has the algorithm and its costs).

    for rows in chunks:
        panel_stats: logits of the chunk, kept for the gradient; their statistics             GEMM 1
        slopes: as in stream.py, vectors of length C
        panel_grad_: d_hidden[rows], d_weight += ..., d_bias += ...                           GEMMs 2 and 3

Every chunk but the first reads and writes all of d_weight, so fewer chunks are faster. A chunk's logits [V, C] are what
the budget bounds; the first chunk can do without where C <= D: it keeps them in d_weight, which is written only then,
unless there is a sum in it already.
Rows without gradient, and losses without any, keep none: their chunks are as long as pays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...budget import chunk_rows
from ...head import Head
from ...selection import Selection
from ...sources import LinearSource, Source
from ...stream import TwoSlopesOf
from ..base import RowState, RowStats
from .sparse import Sparse

__all__ = ["PANEL", "backward", "forward", "takes"]

# As in panels.cpp: rows of the weight in a panel, and in a group of panels.
PANEL, _GROUP = 256, 2048
# Beyond this many tokens a chunk gains nothing, and rows of exactly 1,024 floats share cache sets: 1.2 times the time.
_LONGEST = 896


def takes(source: Source) -> bool:
    """Returns whether this loop can do the head; stream.py does all."""
    return (
        isinstance(source, LinearSource)
        and source.dtype == torch.float32
        and source.device.type == "cpu"
        and source.weight.stride(1) == 1
    )


class _Chunk(NamedTuple):
    rows: slice
    hidden: Tensor  # [C, D]
    keep: Tensor | None  # logits [V, C], for the gradient
    in_d_weight: bool  # and where they lie


def forward(
    source: LinearSource,
    selection: Selection,
    targets: Tensor,
    head: Head,
    entropy: bool,
    slopes: TwoSlopesOf | None = None,
) -> RowStats:
    """Does what `stream.forward` does."""
    out = RowStats.empty(selection.size, source.dtype, source.device, entropy)
    middle = selection.with_gradient if slopes is not None else 0
    sparse = Sparse(source, head) if source.tolerance else None
    for chunk in _keeping_chunks(source, middle):
        found = _stats(source, chunk, targets, head, entropy)
        out = out.put(chunk.rows, found)
        if slopes is None:
            continue
        if sparse is None or chunk.keep is None:
            _put_gradient(source, chunk, targets, head, found, slopes)
        else:
            sparse.add(chunk.rows, chunk.hidden, chunk.keep, targets[chunk.rows], found, slopes)
    if sparse is not None:
        source.left_out = sparse.left_out
    for chunk in _chunks(source, middle, selection.size):
        out = out.put(chunk.rows, _stats(source, chunk, targets, head, entropy))
    return out


def backward(
    source: LinearSource, selection: Selection, targets: Tensor, head: Head, stats: RowStats, slopes: TwoSlopesOf
) -> None:
    """Does what `stream.backward` does: the logits are computed again, panel by panel, and kept nowhere."""
    for chunk in _chunks(source, 0, selection.size):
        at = chunk.rows
        _put_gradient(source, chunk, targets, head, stats.map(lambda t, at=at: t[at]), slopes)  # type: ignore[misc]


def _keeping_chunks(source: LinearSource, size: int) -> Iterator[_Chunk]:
    """Yields chunks of the rows [0, size) whose logits wait for the gradient."""
    if size == 0:
        return
    step = chunk_rows(size, _row_bytes(source, keep=True), 0, "cpu", most=_LONGEST)
    start = 0
    if source.d_weight is not None and not source.tolerance and not source.has_sum:
        torch.ops.trapo_kernels_cpu.advise_huge_pages(source.d_weight)
        first = min(size, source.weight.shape[1], _LONGEST)
        if first == size or 1 - (first - size) // step <= -(-size // step):
            yield _chunk(source, 0, first, source.d_weight[:, :first], in_d_weight=True)
            start = first
    if start == size:
        return
    step = chunk_rows(size - start, _row_bytes(source, keep=True), 0, "cpu", most=_LONGEST)
    buffer = torch.empty(source.vocab, min(step, size - start), dtype=source.dtype, device=source.device)
    torch.ops.trapo_kernels_cpu.advise_huge_pages(buffer)
    for at in range(start, size, step):
        stop = min(at + step, size)
        yield _chunk(source, at, stop, buffer[:, : stop - at])


def _chunks(source: LinearSource, start: int, size: int) -> Iterator[_Chunk]:
    """Yields chunks of the rows [start, size) whose logits are not kept."""
    if start == size:
        return
    step = chunk_rows(size - start, _row_bytes(source, keep=False), 0, "cpu", most=_LONGEST)
    for at in range(start, size, step):
        yield _chunk(source, at, min(at + step, size))


def _chunk(
    source: LinearSource, start: int, stop: int, keep: Tensor | None = None, in_d_weight: bool = False
) -> _Chunk:
    rows = slice(start, stop)
    return _Chunk(rows, source.selection.take(source.hidden, rows), keep, in_d_weight)


def _row_bytes(source: LinearSource, keep: bool) -> int:
    """Returns what a token of a chunk holds: its logits, its part of a group's gradient, its panels' states, its hidden
    state and that one's gradient where rows are picked."""
    picked = 0 if source.selection.order is None and not source.tolerance else 2 * source.weight.shape[1]
    states = 3 * -(-source.vocab // PANEL)
    return 4 * ((source.vocab if keep else 0) + _GROUP + states + picked)


def _stats(source: LinearSource, chunk: _Chunk, targets: Tensor, head: Head, entropy: bool) -> RowStats:
    top, rest, dot, target = torch.ops.trapo_kernels_cpu.panel_stats(
        chunk.hidden, source.weight, source.bias, targets[chunk.rows], head.scale, head.cap, entropy, keep=chunk.keep
    )
    return RowState(top, rest, dot if entropy else None, target).finish()


def _put_gradient(
    source: LinearSource, chunk: _Chunk, targets: Tensor, head: Head, stats: RowStats, slopes: TwoSlopesOf
) -> None:
    at, order = chunk.rows, source.selection.order
    g_lp, g_entropy = slopes(at, stats)
    d_hidden = source.d_hidden
    if d_hidden is not None:
        d_hidden = d_hidden[at] if order is None else torch.empty_like(chunk.hidden)
    torch.ops.trapo_kernels_cpu.panel_grad_(
        chunk.hidden, source.weight, source.bias, targets[at], head.scale, head.cap, *stats,
        g_lp=g_lp * head.scale,
        g_entropy=None if g_entropy is None else g_entropy * head.scale,
        kept=None if chunk.in_d_weight else chunk.keep,
        kept_in_d_weight=chunk.in_d_weight,
        d_hidden=d_hidden,
        d_weight=source.d_weight,
        d_bias=source.d_bias,
        accumulate_weight=source.begin_sum(),
        accumulate_hidden=False,
    )  # fmt: skip
    if source.d_hidden is not None and d_hidden is not None and order is not None:
        source.d_hidden.index_copy_(0, order[at], d_hidden)
