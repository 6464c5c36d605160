"""This is the chunk loop of stream.py on a CPU for fp32, bf16 and fp16 heads, with softmax and GEMMs interleaved panel
by panel in C++ (csrc/cpu/panels.h has the algorithm and its costs).

    for rows in chunks:
        panel_stats: statistics of the chunk; its logits are kept for the gradient            GEMM 1
        slopes: as in stream.py, vectors of length C
        panel_grad_: d_hidden[rows], d_weight (+)= ..., d_bias += ...                         GEMMs 2 and 3

Logits wait in d_weight, which is written only then (those of the first D tokens; of 2 D where 16-bit logits wait in a
wide d_weight), and in a buffer that the budget bounds. What has room in neither gets another chunk, for which d_weight
is read and written. Logits of chunks that would be too small are computed again.

bf16 operands are multiplied as they are where the CPU can (AVX512-BF16, AMX), and otherwise, as those in fp16 always,
widened a panel at a time. In no case is a logit rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...chunks.budget import get_budget_mb
from ...chunks.sources import LinearSource, Source
from ...stream import Loop, TwoSlopesOf
from ..base import RowState, RowStats
from .operands import BLOCK, FLOATS, PANEL, Keep, products_of
from .sparse import Sparse

__all__ = ["backward", "forward", "takes"]

# Tokens whose gradient of logits is there at once, for a group of panels, or whose statistics are, for all panels.
_AT_ONCE = 2048
_TOKENS = 512  # of which products along tokens are made (panel_grad.cpp)
_LEAST_GROUP = 4  # panels
# A chunk of its own pays from this many blocks on: for fewer, computing logits again is cheaper than reading and
# writing all of d_weight.
_LEAST_BLOCKS = 2


def takes(source: Source) -> bool:
    """Returns whether this loop can do the head; stream.py does all."""
    return (
        type(source) is LinearSource  # whose logits are those of a single product
        and source.operands in (torch.float32, torch.bfloat16, torch.float16)
        and products_of(source.operands) is not None
        and source.device.type == "cpu"
        and source.weight.stride(1) == 1
    )


class _Chunk(NamedTuple):
    rows: slice
    hidden: Tensor  # [C, D]
    keep: Keep


_NOWHERE = Keep(False, None)


def forward(loop: Loop, entropy: bool, slopes: TwoSlopesOf | None = None) -> RowStats:
    """Does what `stream.forward` does."""
    source, selection = _linear(loop), loop.selection
    out = RowStats.empty(selection.size, torch.float32, source.device, entropy)
    middle = selection.with_gradient if slopes is not None else 0
    if middle:
        assert slopes is not None
        sparse = Sparse(source, loop.head) if source.tolerance else None
        for chunk in _keeping_chunks(source, middle):
            found, references = _stats(loop, chunk, entropy)
            chunk = chunk._replace(keep=chunk.keep._replace(references=references))
            out = out.put(chunk.rows, found)
            if sparse is None:
                _put_gradient(loop, chunk, found, slopes)
            else:
                sparse.add(chunk.rows, chunk.hidden, chunk.keep, loop.targets[chunk.rows], found, slopes)
        if sparse is not None:
            source.left_out = sparse.left_out
    if middle < selection.size:
        at = slice(middle, selection.size)
        found, _ = _stats(loop, _Chunk(at, selection.take(source.hidden, at), _NOWHERE), entropy)
        out = out.put(at, found)
    return out


def backward(loop: Loop, stats: RowStats, slopes: TwoSlopesOf) -> None:
    """Does what `stream.backward` does: the logits are computed again, panel by panel, and kept nowhere."""
    if loop.selection.size:
        rows = slice(0, loop.selection.size)
        chunk = _Chunk(rows, loop.selection.take(_linear(loop).hidden, rows), _NOWHERE)
        _put_gradient(loop, chunk, stats, slopes)


def _linear(loop: Loop) -> LinearSource:
    assert isinstance(loop.source, LinearSource)  # `takes` no other
    return loop.source


# What is kept -----------------------------------------------------------------------------------------------------


def _keeping_chunks(source: LinearSource, size: int) -> Iterator[_Chunk]:
    """Yields chunks of the rows [0, size) whose logits wait for the gradient."""
    kept = torch.float32 if source.operands == torch.float32 else torch.int16
    panels = -(-source.vocab // PANEL)
    room = int(get_budget_mb("cpu") * 2**20) - min(size, _at_once(source)) * _gradient_bytes(source)
    in_buffer = max(0, room // (panels * PANEL * BLOCK * kept.itemsize))
    in_weight = 0
    # Not where there is a sum in it already.
    free = source.d_weight is not None and not source.tolerance and not source.has_sum
    if free and source.d_weight is not None and source.d_weight.is_contiguous():
        in_weight = source.d_weight.shape[1] * source.d_weight.itemsize // (BLOCK * kept.itemsize)
        torch.ops.trapo_kernels_cpu.advise_huge_pages(source.d_weight)
    blocks = -(-size // BLOCK)
    first, step = _lengths(source, blocks, in_weight, in_buffer)
    buffer = None
    # The chunk with the most blocks in the buffer may be any of them.
    most = max(min(in_buffer, first - in_weight), min(in_buffer, step, blocks - first))
    if most > 0:
        buffer = torch.empty(panels, most, PANEL, BLOCK, dtype=kept, device=source.device)
        torch.ops.trapo_kernels_cpu.advise_huge_pages(buffer)
    bounds = [0, *range(first, blocks, max(step, 1)), blocks]
    for start, stop in pairwise(bounds):
        rows = slice(start * BLOCK, min(stop * BLOCK, size))
        # A sum goes on in d_weight from the second chunk on.
        keep = Keep(in_weight > 0 and start == 0, buffer)
        yield _Chunk(rows, source.selection.take(source.hidden, rows), keep)


def _lengths(source: LinearSource, blocks: int, in_weight: int, in_buffer: int) -> tuple[int, int]:
    """Returns the blocks of the first chunk and of each of the others."""
    sums = source.d_weight is not None
    rounded = source.d_weight is not None and source.d_weight.dtype != source.wide  # it can be written once
    if in_weight + in_buffer >= blocks or rounded or (sums and in_buffer < _LEAST_BLOCKS):
        return blocks, blocks
    others = -(-(blocks - in_weight - in_buffer) // max(in_buffer, 1))
    step = max(1, -(-(blocks - in_weight) // (others + 1)))
    return min(blocks, in_weight + step), step


def _at_once(source: LinearSource) -> int:
    """Returns the tokens, so that the gradient of their logits takes an eighth of the budget at most, for a group of
    the least size. The same for any number of threads."""
    most = int(get_budget_mb("cpu") * 2**17) // _gradient_bytes(source)
    multiple = _TOKENS if most >= _TOKENS else BLOCK
    return min(_AT_ONCE, max(BLOCK, most // multiple * multiple))


def _gradient_bytes(source: LinearSource) -> int:
    """Returns what a token holds of a group of panels: in fp32, or twice in bf16 (panel_grad.cpp)."""
    group = PANEL * _LEAST_GROUP
    return 4 * group if products_of(source.operands) == FLOATS else 2 * group + 4 * PANEL


def _parts(source: LinearSource) -> dict[str, int]:
    """Returns the tokens and panels that panel_grad_ has at once: with many threads more panels, of fewer tokens. Sums
    are made of products of 512 tokens, so that results do not depend on it."""
    at_once = _at_once(source)
    group = max(_LEAST_GROUP, 2 * torch.get_num_threads())
    tokens = max(min(_TOKENS, at_once), at_once * _LEAST_GROUP // group // _TOKENS * _TOKENS)
    most = int(get_budget_mb("cpu") * 2**18) // (4 * PANEL * tokens) // 2 * 2
    return {"at_once": at_once if group == _LEAST_GROUP else tokens, "group": min(group, max(_LEAST_GROUP, most))}


# The operators ----------------------------------------------------------------------------------------------------


def _stats(loop: Loop, chunk: _Chunk, entropy: bool) -> tuple[RowStats, Tensor]:
    """Returns the chunk's statistics, and the references of what was kept."""
    source, head, keep = _linear(loop), loop.head, chunk.keep
    top, rest, dot, target, references = torch.ops.trapo_kernels_cpu.panel_stats(
        chunk.hidden, source.weight, source.bias, loop.targets[chunk.rows], head.scale, head.cap, entropy,
        products_of(source.operands), _at_once(source),
        keep_in_weight=source.d_weight if keep.in_d_weight else None, keep=keep.buffer,
    )  # fmt: skip
    return RowState(top, rest, dot if entropy else None, target).finish(), references


def _put_gradient(loop: Loop, chunk: _Chunk, stats: RowStats, slopes: TwoSlopesOf) -> None:
    source, head = _linear(loop), loop.head
    at, order, keep = chunk.rows, source.selection.order, chunk.keep
    g_lp, g_entropy = slopes(at, stats)
    d_hidden = source.d_hidden
    if d_hidden is not None:
        d_hidden = d_hidden[at] if order is None else torch.empty_like(chunk.hidden, dtype=d_hidden.dtype)
    torch.ops.trapo_kernels_cpu.panel_grad_(
        chunk.hidden, source.weight, source.bias, loop.targets[at], head.scale, head.cap, *stats,
        g_lp=g_lp * (head.scale * source.factor),
        g_entropy=None if g_entropy is None else g_entropy * (head.scale * source.factor),
        products=products_of(source.operands),
        **_parts(source),
        kept_in_d_weight=keep.in_d_weight,
        kept=keep.buffer,
        references=keep.references,
        d_hidden=d_hidden,
        d_weight=source.d_weight,
        d_bias=source.d_bias,
        accumulate_weight=source.begin_sum(),
        accumulate_hidden=False,
    )  # fmt: skip
    if source.d_hidden is not None and d_hidden is not None and order is not None:
        source.d_hidden.index_copy_(0, order[at], d_hidden)
