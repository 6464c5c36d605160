"""The Triton tile kernel computes row statistics of z = cap(scale · (h Wᵀ + b)); the logits stay in registers. Host:
tiles.py.

    linear_stats:  per row block [BM] and share of the vocabulary, tile by tile: acc = h Wᵀ [BM, BN]; z; the state
                   (m = max z, Σ e^(z−m) but one column at m, Σ e^(z−m)(z−m), z_y) is folded; one per row and share is
                   written
    merge_stats:   the states of a row's shares become one, in the order of the shares

FLOPs: 2·N·D·V, one GEMM. Bytes written: 16·N per share, nothing of size N·V. Bytes read: hidden once per share, weight
once per row block, most of it from L2: programs that run at the same time are GROUP row blocks by as many shares as fit
the card, so that a tile of W is shared by GROUP programs and a block of h by the others.
No atomics; the order of every sum is fixed by N, D, V and the number of multiprocessors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_kernels import fold, moved, soft_cap

__all__ = ["linear_stats", "merge_stats"]


@triton.jit
def _place(rows, shares, BM: tl.constexpr, GROUP: tl.constexpr):
    """Returns (row block, share) of this program."""
    blocks = tl.cdiv(rows, BM)
    program = tl.program_id(0)
    group = program // (GROUP * shares)
    first = group * GROUP
    size = tl.minimum(blocks - first, GROUP)
    inside = program - group * GROUP * shares
    return first + inside % size, inside // size


@triton.jit
def _product(
    hidden, weight, row, column, rows, V, D, stride_h, stride_w,
    DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    SPECIALIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Returns h[row : row + BM] W[column : column + BN]ᵀ in fp32. Rows and columns beyond the end are garbage or
    zero."""
    acc = tl.zeros([BM, BN], tl.float32)
    i = row + tl.arange(0, BM)
    j = column + tl.arange(0, BN)
    i = tl.where(i < rows, i, 0).to(tl.int64)
    j = tl.where(j < V, j, 0).to(tl.int64)
    for start in tl.range(0, D, BK, warp_specialize=SPECIALIZE):
        if DESCRIPTORS:
            a = hidden.load([row, start])
            b = weight.load([column, start])
        else:
            k = start + tl.arange(0, BK)
            if EVEN:
                a = tl.load(hidden + i[:, None] * stride_h + k[None, :])
                b = tl.load(weight + j[:, None] * stride_w + k[None, :])
            else:
                a = tl.load(hidden + i[:, None] * stride_h + k[None, :], mask=k[None, :] < D, other=0.0)
                b = tl.load(weight + j[:, None] * stride_w + k[None, :], mask=k[None, :] < D, other=0.0)
        if WIDEN:  # the interpreter's dot of bf16 operands is garbage
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _fold_tile(
    acc, bias, y, m, s, d, z_y, column, V, scale, cap: tl.constexpr, LOGITS: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Returns the states [BM] after the columns of `acc` [BM, BN]; z_y where y is among them."""
    j = column + tl.arange(0, BN)
    if bias is not None:
        acc += tl.load(bias + j, mask=j < V, other=0.0).to(tl.float32)[None, :]
    # Rounded as a GEMM would write them, so that old and new logprobs differ by the policy and not by the kernel.
    z = (acc * scale).to(LOGITS).to(tl.float32)
    if cap is not None:
        z = soft_cap(z, cap)
    z = tl.where((j < V)[None, :], z, float("-inf"))
    z_y = tl.maximum(z_y, tl.max(tl.where(j[None, :] == y[:, None], z, float("-inf")), 1))
    m, s, d = fold(z, m, s, d)
    return m, s, d, z_y


# How many rows there are changes from call to call, and in a graph capture: one kernel for any number.
@triton.jit(do_not_specialize=["rows", "shares"])
def linear_stats(
    hidden, weight, bias, targets, max_, rest_, dot, target, rows, V, D, stride_h, stride_w, shares, scale,
    cap: tl.constexpr, LOGITS: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, HALVES: tl.constexpr, SPECIALIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block, share = _place(rows, shares, BM, GROUP)
    row = block * BM
    i = row + tl.arange(0, BM)
    y = tl.load(targets + i, mask=i < rows, other=-1)
    m = tl.full([BM], float("-inf"), tl.float32)
    s = tl.zeros([BM], tl.float32)
    d = tl.zeros([BM], tl.float32)
    z_y = tl.full([BM], float("-inf"), tl.float32)
    tiles = tl.cdiv(V, BN)
    each = tl.cdiv(tiles, shares)
    for tile in range(share * each, tl.minimum(share * each + each, tiles)):
        column = tile * BN
        acc = _product(
            hidden, weight, row, column, rows, V, D, stride_h, stride_w,
            DESCRIPTORS, WIDEN, PRECISION, EVEN, SPECIALIZE, BM, BN, BK,
        )  # fmt: skip
        if HALVES:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
            m, s, d, z_y = _fold_tile(left, bias, y, m, s, d, z_y, column, V, scale, cap, LOGITS, BN // 2)
            column += BN // 2
            m, s, d, z_y = _fold_tile(right, bias, y, m, s, d, z_y, column, V, scale, cap, LOGITS, BN // 2)
        else:
            m, s, d, z_y = _fold_tile(acc, bias, y, m, s, d, z_y, column, V, scale, cap, LOGITS, BN)
    z_y = tl.where((y >= 0) & (y < V), z_y, float("nan"))  # as in row_kernels.py
    at = share * rows + i
    tl.store(max_ + at, m, mask=i < rows)
    tl.store(rest_ + at, s, mask=i < rows)
    tl.store(dot + at, d, mask=i < rows)
    tl.store(target + at, z_y, mask=i < rows)


@triton.jit(do_not_specialize=["rows", "shares"])
def merge_stats(
    max_in, rest_in, dot_in, target_in, max_, rest_, dot, target, rows, shares, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < rows
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    d = tl.zeros([BLOCK], tl.float32)
    z_y = tl.full([BLOCK], float("-inf"), tl.float32)
    for share in range(0, shares):
        at = share * rows + i
        m_part = tl.load(max_in + at, mask=inside, other=float("-inf"))
        s_part = tl.load(rest_in + at, mask=inside, other=0.0)
        d_part = tl.load(dot_in + at, mask=inside, other=0.0)
        z_part = tl.load(target_in + at, mask=inside, other=float("-inf"))
        z_y = tl.where((z_part > z_y) | (z_part != z_part), z_part, z_y)
        top = tl.maximum(m, m_part)
        s, d, held = moved(m, s, d, top)
        s_part, d_part, held_part = moved(m_part, s_part, d_part, top)
        s = s + s_part + (held & held_part).to(s.dtype)
        d = d + d_part
        m = top
    tl.store(max_ + i, m, mask=inside)
    tl.store(rest_ + i, s, mask=inside)
    tl.store(dot + i, d, mask=inside)
    tl.store(target + i, z_y, mask=inside)
