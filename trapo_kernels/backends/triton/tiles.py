"""This file launches forward-only statistics of a linear head in Triton: no logit is written. Kernels: tile_kernels.py.

Tiles come from the table here, chosen offline by architecture and type of operand; nothing is tuned at a user's call.
The arithmetic behind it: per k-step a program moves (BM + BN)·BK operands for 2·BM·BN·BK FLOPs, and per tile its
epilogue takes about 25 instructions and one exp per logit against 2·D FLOPs of tensor cores. At D = 3584 a tile of
128 × 128 is 15 µs of tensor cores on an H100 multiprocessor (7.5 TFLOP/s each) against about 3 µs of epilogue, and asks
L2 for one byte per 64 FLOPs (128 × 256: per 85, but its epilogue spills on sm_90). Counts and bounds: no card has run
it. By Triton 3.9 the 16-bit entries of sm_90 compile without spills, with a bias and a soft-cap too.

The vocabulary is cut into shares so that row blocks times shares fill the card in whole waves: `shares` minimises the
tiles of the longest-running multiprocessor. A share writes one state per row, and a second kernel merges them in order.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...chunks.products import soft_capped
from ...head import Head
from ..base import RowState, RowStats
from .rows import interpreted, target_logits

__all__ = ["Tile", "linear_stats", "shares", "tile"]

# Row blocks that run side by side, so that they share tiles of the weight in L2.
GROUP = 16

_MERGE_ROWS = 256

# The interpreter's stand-in for a number of multiprocessors: enough for several shares.
_INTERPRETED_PROCESSORS = 8


class Tile(NamedTuple):
    """Describes a program's tile, and how it is compiled. `descriptors`: operands by TMA instead of pointers; `halves`:
    the epilogue takes the tile in two halves, which halves its registers. `specialized`: warps of their own load and
    multiply, beside those of the epilogue; for sm_90 the compiler changes nothing by it, or fails."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    descriptors: bool
    halves: bool = False
    specialized: bool = False


# (architecture from, bytes of an operand) -> tile. Architectures: 8.0 A100, 9.0 H100, 10.0 B200, 12.0 RTX.
_TABLE: dict[tuple[int, int], Tile] = {
    (80, 2): Tile(128, 128, 64, 8, 3, False),
    (80, 4): Tile(128, 64, 32, 8, 3, False),
    (90, 2): Tile(128, 128, 64, 8, 3, True),
    (90, 4): Tile(128, 128, 32, 8, 3, True),
    (100, 2): Tile(128, 256, 64, 8, 3, True, halves=True),  # specialized, it spills
    (100, 4): Tile(128, 128, 32, 8, 3, True, specialized=True),
    (120, 2): Tile(128, 64, 64, 8, 3, True),
    (120, 4): Tile(128, 64, 32, 8, 3, True),
}


def _interpreted_tile(vocab: int) -> Tile:
    """Returns a tile that is small for small problems, so that there are several tiles; wide where an interpreter would
    take minutes."""
    return Tile(16, 64 if vocab < 4_096 else 2_048, 32, 1, 1, False)


# By pointers where D is no multiple of BK: a mask per element takes registers.
_UNEVEN = Tile(128, 64, 32, 8, 3, False)


def tile(arch: int, itemsize: int, width: int, aligned: bool = True) -> Tile:
    """Returns the table's entry for an architecture (80, 90, ...): its own, or the nearest below. `aligned`: rows of
    both operands start at multiples of 16 bytes, which descriptors need; without them, sm_80's tiles serve
    everywhere."""
    key = max(known for known in _TABLE if known[1] == itemsize and known[0] <= max(arch, 80))
    chosen = _TABLE[key]
    if chosen.descriptors and aligned:
        return chosen
    plain = _TABLE[80, itemsize]
    return plain if width % plain.BK == 0 else _UNEVEN


def shares(rows: int, vocab: int, tile: Tile, processors: int) -> int:
    """Returns parts of the vocabulary: the fewest that keep the processors busy in whole waves."""
    blocks, tiles = -(-rows // tile.BM), -(-vocab // tile.BN)
    least = min(tiles, -(-processors // GROUP))  # while fewer row blocks than GROUP are in flight, L2 is shared
    most = min(tiles, max(least, -(-8 * processors // blocks)))
    # Programs per processor, times tiles per program: the length of the longest queue.
    return min(range(least, most + 1), key=lambda n: (-(-blocks * n // processors) * -(-tiles // n), n))


@functools.cache
def _card(index: int) -> tuple[int, int]:
    """Returns (architecture, multiprocessors) of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _kernels() -> ModuleType:
    from . import tile_kernels

    return tile_kernels


def _able(hidden: Tensor, weight: Tensor) -> bool:
    """Returns whether the tile kernel takes these: rows without gaps, and products no less exact than torch's own."""
    if hidden.dtype == torch.float64 or weight.stride(1) != 1:
        return False
    if hidden.dtype != torch.float32 or interpreted():
        return True
    return torch.get_float32_matmul_precision() != "highest"


def _launch_options(hidden: Tensor, weight: Tensor) -> tuple[Tile, int]:
    """Returns (tile, multiprocessors) for these operands."""
    if interpreted() and not hidden.is_cuda:
        return _interpreted_tile(weight.shape[0]), _INTERPRETED_PROCESSORS
    arch, processors = _card(hidden.device.index)
    aligned = all(t.stride(0) * t.dtype.itemsize % 16 == 0 and t.data_ptr() % 16 == 0 for t in (hidden, weight))
    return tile(arch, hidden.dtype.itemsize, weight.shape[1], aligned), processors


def _operands(hidden: Tensor, weight: Tensor, tile: Tile) -> tuple[Any, Any]:
    if not tile.descriptors:
        return hidden, weight
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor(hidden, list(hidden.shape), list(hidden.stride()), [tile.BM, tile.BK]),
        TensorDescriptor(weight, list(weight.shape), list(weight.stride()), [tile.BN, tile.BK]),
    )


def _logit_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    cap: float | None,
    tile: Tile,
    parts: int,
) -> list[Tensor]:
    """Launches both kernels; returns the four vectors [N] of a RowState."""
    kernels, rows, (vocab, width) = _kernels(), hidden.shape[0], weight.shape
    partial = [hidden.new_empty(parts, rows, dtype=torch.float32) for _ in range(4)]
    a, b = _operands(hidden, weight, tile)
    widen = interpreted() and hidden.dtype != torch.float32
    kernels.linear_stats[(-(-rows // tile.BM) * parts,)](
        a, b, bias, targets, *partial, rows, vocab, width, hidden.stride(0), weight.stride(0), parts, scale,
        cap=cap, LOGITS=_logit_type(hidden.dtype), DESCRIPTORS=tile.descriptors, WIDEN=widen,
        PRECISION="tf32" if hidden.dtype == torch.float32 and not interpreted() else "ieee",
        EVEN=width % tile.BK == 0, HALVES=tile.halves, SPECIALIZE=tile.specialized,
        BM=tile.BM, BN=tile.BN, BK=tile.BK, GROUP=GROUP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts == 1:
        return [t[0] for t in partial]
    out = [hidden.new_empty(rows, dtype=torch.float32) for _ in range(4)]
    kernels.merge_stats[(-(-rows // _MERGE_ROWS),)](*partial, *out, rows, parts, BLOCK=_MERGE_ROWS)
    return out


@torch.library.custom_op("trapo_kernels::triton_linear_stats", mutates_args=())
def _linear_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, cap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not hidden.shape[0]:
        empty = hidden.new_empty(4, 0, dtype=torch.float32)
        return empty[0].clone(), empty[1].clone(), empty[2].clone(), empty[3].clone()
    chosen, processors = _launch_options(hidden, weight)
    parts = shares(hidden.shape[0], weight.shape[0], chosen, processors)
    with torch.cuda.device_of(hidden):
        out = launch(hidden, weight, bias, targets, scale, cap, chosen, parts)
    return out[0], out[1], out[2], out[3]


@_linear_stats.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = [hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(4)]
    return out[0], out[1], out[2], out[3]


def linear_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, entropy: bool
) -> RowStats | None:
    """Returns the statistics of each row [N] of z = cap(scale · (hidden Wᵀ + bias)); None: not for these operands,
    stream them."""
    if not _able(hidden, weight):
        return None
    bias = None if bias is None else bias.contiguous()
    top, rest, dot, target = _linear_stats(
        hidden.contiguous(), weight, bias, targets.contiguous(), head.scale, head.cap
    )
    state = RowState(top, rest, dot if entropy else None, target)
    if hidden.dtype != torch.float32:
        state = state.with_target(soft_capped(target_logits(hidden, weight, bias, targets, head.scale), head.cap))
    return state.finish()
