"""The chunk loop of stream.py for fp32 heads on a CPU, with softmax and GEMMs interleaved panel by panel in C++
(csrc/cpu/panels.cpp has the algorithm and its costs).

    for rows in chunks:
        panel_stats: logits of the chunk, kept for the gradient; their statistics             GEMM 1
        slopes: as in stream.py, vectors of length C
        panel_grad_: d_hidden[rows], d_weight += ..., d_bias += ...                           GEMMs 2 and 3

Every chunk but the first reads and writes all of d_weight, so fewer chunks are faster. A chunk's logits [V, C] are what
the budget bounds; the first chunk can do without where C <= D: it keeps them in d_weight, which is written only then.
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
from ...stream import Slopes
from ..base import RowState, RowStats
from .sparse import Sparse

__all__ = ["PANEL", "backward", "forward", "takes"]

# As in panels.cpp: rows of the weight in a panel, and in a group of panels.
PANEL, _GROUP = 256, 2048
# Beyond this many tokens a chunk gains nothing, and rows of exactly 1,024 floats share cache sets: 1.2 times the time.
_LONGEST = 896


def takes(source: Source) -> bool:
    """Whether this loop can do the head; stream.py does all."""
    return (
        isinstance(source, LinearSource)
        and source.dtype == torch.float32
        and source.device.type == "cpu"
        and source.weight.stride(1) == 1
    )


class _Chunk(NamedTuple):
    rows: slice
    keep: Tensor | None  # logits [V, C], for the gradient
    in_d_weight: bool  # and where they lie


def forward(
    source: LinearSource, selection: Selection, targets: Tensor, head: Head, entropy: bool, slopes: Slopes | None = None
) -> RowStats:
    """`stream.forward`."""
    vectors = [torch.empty(selection.size, dtype=source.dtype, device=source.device) for _ in range(4)]
    out = RowStats(vectors[0], vectors[1], vectors[2], vectors[3] if entropy else None)
    middle = selection.with_gradient if slopes is not None else 0
    sparse = Sparse(source, head) if source.tolerance else None
    for chunk in _keeping_chunks(source, middle):
        found = _stats(source, chunk, targets, head, entropy)
        out.put(chunk.rows, found)
        if slopes is None:
            continue
        if sparse is None or chunk.keep is None:
            _grad(source, chunk, targets, head, found, slopes)
        else:
            sparse.add(chunk.rows, chunk.keep, targets[chunk.rows], found, slopes)
    if sparse is not None:
        source.left_out = sparse.left_out
    for chunk in _chunks(source, middle, selection.size):
        out.put(chunk.rows, _stats(source, chunk, targets, head, entropy))
    return out


def backward(
    source: LinearSource, selection: Selection, targets: Tensor, head: Head, stats: RowStats, slopes: Slopes
) -> None:
    """`stream.backward`: the logits are computed again, panel by panel, and kept nowhere."""
    for chunk in _chunks(source, 0, selection.size):
        source.chunk = selection.take(source.hidden, chunk.rows)
        at = chunk.rows
        _grad(source, chunk, targets, head, stats.map(lambda t, at=at: t[at]), slopes)  # type: ignore[misc]


def _keeping_chunks(source: LinearSource, size: int) -> Iterator[_Chunk]:
    """Chunks of the rows [0, size) whose logits wait for the gradient."""
    if size == 0:
        return
    step = chunk_rows(size, _row_bytes(source, keep=True), 0, "cpu", most=_LONGEST)
    start = 0
    if source.d_weight is not None and not source.tolerance:
        torch.ops.trapo_kernels_cpu.advise_huge_pages(source.d_weight)
        first = min(size, source.weight.shape[1], _LONGEST)
        if first == size or 1 - (first - size) // step <= -(-size // step):
            yield _Chunk(slice(0, first), source.d_weight[:, :first], True)
            start = first
    if start == size:
        return
    step = chunk_rows(size - start, _row_bytes(source, keep=True), 0, "cpu", most=_LONGEST)
    buffer = torch.empty(source.vocab, min(step, size - start), dtype=source.dtype, device=source.device)
    torch.ops.trapo_kernels_cpu.advise_huge_pages(buffer)
    for at in range(start, size, step):
        stop = min(at + step, size)
        yield _Chunk(slice(at, stop), buffer[:, : stop - at], False)


def _chunks(source: LinearSource, start: int, size: int) -> Iterator[_Chunk]:
    """Chunks of the rows [start, size) whose logits are not kept."""
    if start == size:
        return
    step = chunk_rows(size - start, _row_bytes(source, keep=False), 0, "cpu", most=_LONGEST)
    for at in range(start, size, step):
        yield _Chunk(slice(at, min(at + step, size)), None, False)


def _row_bytes(source: LinearSource, keep: bool) -> int:
    """What a token of a chunk holds: its logits, its part of a group's gradient, its panels' states, its hidden state
    and that one's gradient where rows are picked."""
    picked = 0 if source.selection.order is None and not source.tolerance else 2 * source.weight.shape[1]
    states = 3 * -(-source.vocab // PANEL)
    return 4 * ((source.vocab if keep else 0) + _GROUP + states + picked)


def _stats(source: LinearSource, chunk: _Chunk, targets: Tensor, head: Head, entropy: bool) -> RowStats:
    source.chunk = source.selection.take(source.hidden, chunk.rows)
    top, rest, dot, target = torch.ops.trapo_kernels_cpu.panel_stats(
        source.chunk, source.weight, source.bias, targets[chunk.rows], head.scale, head.cap, entropy, chunk.keep
    )
    return RowState(top, rest, dot if entropy else None, target).finish()


def _grad(source: LinearSource, chunk: _Chunk, targets: Tensor, head: Head, stats: RowStats, slopes: Slopes) -> None:
    at, order = chunk.rows, source.selection.order
    g_lp, g_entropy = slopes(at, stats)
    d_hidden = source.d_hidden
    if d_hidden is not None:
        d_hidden = d_hidden[at] if order is None else torch.empty_like(source.chunk)
    torch.ops.trapo_kernels_cpu.panel_grad_(
        source.chunk,
        source.weight,
        source.bias,
        targets[at],
        head.scale,
        head.cap,
        *stats,
        g_lp * head.scale,
        None if g_entropy is None else g_entropy * head.scale,
        None if chunk.in_d_weight else chunk.keep,
        chunk.in_d_weight,
        d_hidden,
        source.d_weight,
        source.d_bias,
        source.beta != 0,
        False,
    )
    if source.d_hidden is not None and d_hidden is not None and order is not None:
        source.d_hidden.index_copy_(0, order[at], d_hidden)
    source.beta = 1.0
