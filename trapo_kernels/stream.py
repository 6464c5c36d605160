"""The chunk loop computes every exact gradient from three GEMMs, with one chunk of logits in memory.

    for rows in chunks:
        x = scale · (hidden[rows] Wᵀ + b)        GEMM 1, into one reused buffer           [C, V]
        row kernel: statistics -> logp, H        vectors of length C; of 16-bit heads with z_y = h · W[y] in fp32
        slopes: g_lp = scale · ∂loss/∂logp, g_H = scale · ∂loss/∂H
        row kernel: x becomes scale · dL/dx in place; where a loss reads z_y, scale · ∂loss/∂z_y is added in column y
        d_hidden[rows] = x W                     GEMM 2
        d_W += xᵀ hidden[rows]                   GEMM 3, accumulated in fp32 (fp64 for fp64)

FLOPs: 2·N·D·V per GEMM, 6·N·D·V in all. Rows without gradient do the first GEMM alone; a frozen head has no third,
frozen hidden states no second. Passes over the logits: GEMM 1 writes them, the row kernel reads them twice and writes
them once, GEMMs 2 and 3 read them. Memory: chunks/budget.py.

Gradients here are sums, undivided: the factor 1/normalizer · grad_output is put on at the end, in the accumulator's
precision. fp16 has a factor of its own (chunks/sources.py), by which a chunk's gradient is multiplied before it is
stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends.base import FusedTerms, FusedVerb, Passes, RowInputs, RowKernel, RowStats, stats_dtype
from .chunks.budget import chunk_rows
from .chunks.buffers import logits_buffer
from .chunks.columns import capped_slope
from .chunks.selection import Selection
from .chunks.sources import Source
from .head import Head
from .statistics import Collector
from .tokens import Slopes

__all__ = ["Fused", "Loop", "SlopesOf", "TwoSlopesOf", "backward", "forward"]

# (compact rows, their statistics) -> their slopes [C]
SlopesOf = Callable[[slice, RowStats], Slopes]
# The same of a loss that has none in the target's logit: g_lp [C], g_H [C] or None
TwoSlopesOf = Callable[[slice, RowStats], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Loop:
    """Says what the chunk loop runs over: the rows that are selected, of which everything is compact, and by what."""

    source: Source
    kernel: RowKernel
    selection: Selection
    targets: Tensor  # [n]
    head: Head

    @property
    def own_passes(self) -> Passes | None:
        """Returns what the kernel has in place of this file's functions, for the sources that it takes."""
        passes = self.kernel.passes
        return passes if passes is not None and passes.takes(self.source) else None


@dataclass(frozen=True)
class Fused:
    """Stands for slopes that a kernel computes itself: its verb, the terms and their compact inputs [n]."""

    verb: FusedVerb
    terms: FusedTerms
    inputs: RowInputs

    def __call__(self, loop: Loop, at: slice, logits: Tensor, z_target: Tensor | None) -> RowStats:
        """Computes statistics of the rows, whose logits become their gradient."""
        inputs = self.inputs.at(at)._replace(target_logits=z_target)
        return self.verb(logits, loop.targets[at], inputs, self.terms, loop.head.scale, loop.head.cap)


def _chunks(loop: Loop, *spans: tuple[int, int], extras: Collector | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, buffer [C, V]) over the spans, none of which shares a chunk with another; one buffer for all."""
    source, kernel = loop.source, loop.kernel
    scratch = kernel.scratch_bytes(source.vocab, source.dtype, source.device) + source.extra_bytes
    if extras is not None:
        scratch += extras.scratch_bytes(source.vocab, source.dtype, source.device)
    longest = max(stop - start for start, stop in spans)
    step = chunk_rows(longest, source.row_bytes, scratch, source.device.type)
    buffer = logits_buffer(min(step, longest), source.vocab, source.dtype, source.device)
    for start, stop in spans:
        for first in range(start, stop, step):
            size = min(step, stop - first)
            yield slice(first, first + size), buffer[:size]


def _without_logit(slopes: SlopesOf) -> TwoSlopesOf:
    """Returns slopes of a loss that has none in the target's logit."""

    def two(at: slice, stats: RowStats) -> tuple[Tensor, Tensor | None]:
        g_lp, g_entropy, _ = slopes(at, stats)
        return torch.zeros_like(stats.logprobs) if g_lp is None else g_lp, g_entropy

    return two


def forward(
    loop: Loop,
    *,
    entropy: bool,
    slopes: SlopesOf | None = None,
    fused: Fused | None = None,
    extras: Collector | None = None,
    by_logit: bool = False,
) -> RowStats:
    """Computes statistics of the rows [n]; with `slopes` also the gradients, put into the source, in the same pass;
    `extras` collects further statistics. `by_logit`: there are slopes in the target's logit. With `fused` the kernel
    does both verbs at once."""
    passes = None if by_logit or (extras is not None and extras.values) else loop.own_passes
    if passes is not None:
        return passes.forward(loop, entropy, None if slopes is None else _without_logit(slopes))
    source, kernel, selection, head = loop.source, loop.kernel, loop.selection, loop.head
    out = RowStats.empty(selection.size, stats_dtype(source.dtype), source.device, entropy)
    middle = selection.with_gradient if slopes is not None else 0
    if source.dtype == torch.float16:  # whose factor follows from the slopes, before they are put into the logits
        fused = None
    for at, buffer in _chunks(loop, (0, middle), (middle, selection.size), extras=extras):
        logits, targets = source.logits(at, buffer), loop.targets[at]
        z_target = source.target_logits(kernel.target_logits, targets, head.cap)
        has_gradient = slopes is not None and at.stop <= middle
        if has_gradient and fused is not None:
            found = fused(loop, at, logits, z_target)
            source.put(at, logits)
        else:
            state = kernel.stats(logits, targets, head.cap, entropy)
            found = (state if z_target is None else state.with_target(z_target)).finish()
            if extras is not None:
                extras.take(at, logits, targets, found, head.cap)
        out = out.put(at, found)
        if slopes is not None and has_gradient and fused is None:
            _put_gradient(loop, at, logits, found, slopes)
    return out


def backward(loop: Loop, stats: RowStats, slopes: SlopesOf, *, by_logit: bool = False) -> None:
    """Computes the gradients of rows whose statistics `forward` gave, by recomputing their logits."""
    passes = None if by_logit else loop.own_passes
    if passes is not None:
        return passes.backward(loop, stats, _without_logit(slopes))
    for at, buffer in _chunks(loop, (0, loop.selection.size)):
        logits = loop.source.logits(at, buffer)
        found = stats.map(lambda t, at=at: t[at])  # type: ignore[misc]
        _put_gradient(loop, at, logits, found, slopes)


def _put_gradient(loop: Loop, at: slice, logits: Tensor, stats: RowStats, slopes: SlopesOf) -> None:
    """Turns the logits of a chunk, rows `at`, into their gradient, which the source gets; stats are the chunk's."""
    source, kernel, head, targets = loop.source, loop.kernel, loop.head, loop.targets[at]
    g_lp, g_entropy, g_logit = (None if g is None else g * head.scale for g in slopes(at, stats))
    g_lp = torch.zeros_like(stats.logprobs) if g_lp is None else g_lp
    if source.dtype == torch.float16:
        unit = source.magnify(_bound(stats, g_lp, g_entropy, g_logit))
        g_lp, g_entropy, g_logit = (None if g is None else g * unit for g in (g_lp, g_entropy, g_logit))
        assert g_lp is not None
    kernel.grad_(logits, targets, stats, g_lp, g_entropy, head.cap)
    if g_logit is not None:
        column, here = (targets, None) if kernel.shard is None else kernel.shard.columns(targets)
        _add_at_target(logits, column, stats, g_logit if here is None else g_logit * here, head.cap)
    source.put(at, logits)


def _bound(stats: RowStats, g_lp: Tensor, g_entropy: Tensor | None, g_logit: Tensor | None) -> Tensor:
    """Returns a bound that no entry of the gradient is above, in rows where all is finite: π |log π + H| <= 1/e + H."""
    found = g_lp.abs()
    if g_entropy is not None and stats.entropy is not None:
        found = found + g_entropy.abs() * (0.5 + stats.entropy)
    if g_logit is not None:
        found = found + g_logit.abs()
    return torch.where(found.isfinite(), found, 0).amax()


def _add_at_target(logits: Tensor, targets: Tensor, stats: RowStats, g_logit: Tensor, cap: float | None) -> None:
    """Adds the gradient of z_y: on one column of each row, so that row kernels need not know of it."""
    if logits.shape[1] == 0:
        return
    z = stats.target_logits
    g_logit = g_logit.masked_fill(z == -torch.inf, 0)  # of a column that a bias of −∞ removed
    if cap is not None:
        g_logit = g_logit * capped_slope(z, cap)
    column = targets[:, None]
    at_target = logits.gather(1, column).squeeze(1)
    logits.scatter_(1, column, (at_target.to(g_logit.dtype) + g_logit).to(logits.dtype)[:, None])
