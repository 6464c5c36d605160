"""A loss on a support is a function of K columns of each row of logits, and of the rest of the row.

    inside [n, K]    z_k − m of the support's ids                  m: the row's largest logit, a constant
    outside [n]      log Σ e^(z_j − m) over all other columns j    −inf where there are none
    entropy [n]      entropy of the distribution over those others, nats

Nothing here subtracts masses: before the row kernel's `stats` reduces a row, the support's columns are taken out of it,
so that the rest is summed by itself however little it is. Its `grad_` gets the statistics of the rest, which makes
every other column's gradient, and the K columns of the support are written over what it leaves there:

    dL/dz_j = ∂L/∂inside_j                                         j in the support
    dL/dz_j = π'_j (∂L/∂outside − ∂L/∂entropy (log π'_j + H'))     else, π' the distribution over the others

Passes over the logits: those of the row kernel. With a soft-cap the rest is summed on a copy, a block of rows at a
time, for a column that is −inf before a tanh is not after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.base import RowKernel, RowState, RowStats, stats_dtype
from ..chunks.budget import chunk_rows
from ..chunks.buffers import block_rows, logits_buffer
from ..chunks.columns import Columns, capped_slope
from ..chunks.selection import Selection
from ..chunks.sources import Source
from ..head import Head

__all__ = ["SupportSlopes", "SupportValues", "backward", "forward", "normalize", "once", "targets_of"]


class SupportValues(NamedTuple):
    """Holds the values of each row, as the module's text names them; entropy None where it was not asked for."""

    inside: Tensor
    outside: Tensor
    entropy: Tensor | None

    def map(self, fn: Callable[[Tensor], Tensor]) -> SupportValues:
        return SupportValues(fn(self.inside), fn(self.outside), None if self.entropy is None else fn(self.entropy))


class SupportSlopes(NamedTuple):
    """Holds the derivatives of a loss by the three, [n, K] and [n]; None: there is none."""

    inside: Tensor
    outside: Tensor
    entropy: Tensor | None


# (compact rows, their values) -> their slopes
SlopesOf = Callable[[slice, SupportValues], SupportSlopes]


def once(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (ids [n, K] with −1 where an id has been before in its row; the position [n, K] at which each stands
    first)."""
    ordered, order = ids.sort(dim=1, stable=True)
    if ids.shape[1] == 0:
        return ids, order
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    first = order.gather(1, torch.where(new, place, 0).cummax(1).values)
    owner = torch.empty_like(order).scatter_(1, order, first)
    return torch.where(owner == place, ids, -1), owner


def targets_of(ids: Tensor) -> Tensor:
    """Returns targets for row kernels, which write one column by themselves: an id of the support [n], 0 of an empty
    one."""
    if ids.shape[1] == 0:
        return ids.new_zeros(ids.shape[0])
    return ids.amax(1).clamp(min=0)


def normalize(inside: Tensor, outside: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (log-probabilities [n, K] of the support, log-mass [n] of the rest), differentiable; without `outside` of
    the distribution over the support alone. Each keeps its digits, whichever has nearly all of the mass."""
    if outside is None:
        outside = inside.new_full((), -torch.inf).expand(inside.shape[0])
    parts = torch.cat([inside, outside[:, None]], 1)
    leader = parts.argmax(1, keepdim=True)
    below = parts - parts.gather(1, leader)
    others = below.exp().scatter(1, leader, 0).sum(1, keepdim=True)
    logprobs = below - others.log1p()
    return logprobs[:, :-1], logprobs[:, -1]


def _capped(x: Tensor, cap: float | None, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if cap is None else cap * torch.tanh(x / cap)


def _finish(state: RowState) -> RowStats:
    """Returns statistics of the rest of the rows. Where a row has none its maximum is ∞, of a gradient of zero."""
    none = state.max == -torch.inf
    found = RowState(state.max, state.rest, state.dot, state.target).finish().map(lambda t: t.masked_fill(none, 0))
    return found._replace(max=state.max.masked_fill(none, torch.inf))


def _reduce(
    kernel: RowKernel, x: Tensor, columns: Columns, targets: Tensor, cap: float | None, entropy: bool
) -> RowStats:
    """Returns statistics of the rest of the rows. Without a soft-cap the support's columns of `x` are −inf from here
    on."""
    minus = x.new_full((1, 1), -torch.inf)
    if cap is None:
        columns.put_(x, minus.expand(columns.index.shape))
        return _finish(kernel.stats(x, targets, None, entropy))
    dtype, longest = stats_dtype(x.dtype), x.shape[1] if kernel.shard is None else kernel.shard.largest
    step = max(1, min(block_rows(max(longest, 1), x.device), x.shape[0]))
    scratch = logits_buffer(step, x.shape[1], dtype, x.device)
    out = RowStats.empty(x.shape[0], dtype, x.device, entropy)
    for start in range(0, x.shape[0], step):
        at = slice(start, min(start + step, x.shape[0]))
        z = scratch[: at.stop - start]
        z.copy_(x[at]).div_(cap).tanh_().mul_(cap)
        columns.at(at).put_(z, minus.to(dtype).expand(columns.index[at].shape))
        out = out.put(at, _finish(kernel.stats(z, targets[at], None, entropy)))
    return out


def _values(z: Tensor, there: Tensor, stats: RowStats) -> SupportValues:
    """Returns the values of rows: of the support's logits z [n, K] where `there` are ids, and the statistics of the
    rest."""
    none = stats.max == torch.inf
    rest_top = stats.max.masked_fill(none, -torch.inf)
    z = z.masked_fill(~there, -torch.inf)
    top = rest_top if z.shape[1] == 0 else torch.maximum(z.amax(1), rest_top)
    inside = (z - top[:, None]).masked_fill(~there, -torch.inf)
    outside = torch.where(none, rest_top, rest_top - top) + stats.log_sum
    return SupportValues(inside, outside + (top - top), stats.entropy)


def _summed(kernel: RowKernel, z: Tensor) -> Tensor:
    """Returns logits of which each rank of a sharded vocabulary has its own, and zeros elsewhere."""
    if kernel.shard is not None:
        torch.distributed.all_reduce(z, group=kernel.shard.group)
    return z


# The chunk loop ----------------------------------------------------------------------------------------------


def _chunks(source: Source, kernel: RowKernel, ids: int, *spans: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, buffer [C, V]) over the spans; one buffer for all."""
    wide = stats_dtype(source.dtype)
    scratch = kernel.scratch_bytes(source.vocab, source.dtype, source.device) + source.extra_bytes
    scratch += block_rows(max(source.vocab, 1), source.device) * source.vocab * wide.itemsize
    longest = max(stop - start for start, stop in spans)
    # Values, their slopes and the indices of the support: some ten tensors [C, K].
    step = chunk_rows(longest, source.row_bytes + 10 * 8 * ids, scratch, source.device.type)
    buffer = logits_buffer(min(step, longest), source.vocab, source.dtype, source.device)
    for start, stop in spans:
        for first in range(start, stop, step):
            size = min(step, stop - first)
            yield slice(first, first + size), buffer[:size]


def forward(
    source: Source,
    kernel: RowKernel,
    selection: Selection,
    ids: Tensor,
    head: Head,
    entropy: bool,
    slopes: SlopesOf | None = None,
) -> tuple[SupportValues, RowStats]:
    """Computes (values of the compact rows, statistics of their rest); with `slopes` also the gradients, put into the
    source in the same pass. ids [n, K] are compact, and none stands twice in a row."""
    dtype, targets = stats_dtype(source.dtype), targets_of(ids)
    size, middle = selection.size, selection.with_gradient if slopes is not None else 0
    out = RowStats.empty(size, dtype, source.device, entropy)
    found = SupportValues(ids.new_empty(ids.shape, dtype=dtype), ids.new_empty(size, dtype=dtype), out.entropy)
    for at, buffer in _chunks(source, kernel, ids.shape[1], (0, middle), (middle, size)):
        x = source.logits(at, buffer)
        columns = Columns.in_shard(ids[at], kernel, source.vocab)
        own = _capped(columns.take(x), head.cap, dtype).masked_fill(~columns.here, 0)
        stats = _reduce(kernel, x, columns, targets[at], head.cap, entropy)
        values = _values(_summed(kernel, own.clone()), ids[at] >= 0, stats)
        found.inside[at], found.outside[at] = values.inside, values.outside
        out = out.put(at, stats)
        if slopes is not None and at.stop <= middle:
            given = slopes(at, values)
            _put_gradient(source, kernel, at, x, columns, targets[at], stats, own, given, head)
    return found._replace(entropy=out.entropy), out


def backward(
    source: Source,
    kernel: RowKernel,
    selection: Selection,
    ids: Tensor,
    head: Head,
    stats: RowStats,
    slopes: SupportSlopes,
) -> None:
    """Computes the gradients of compact rows whose statistics `forward` gave, by recomputing their logits."""
    targets, dtype = targets_of(ids), stats_dtype(source.dtype)
    for at, buffer in _chunks(source, kernel, ids.shape[1], (0, selection.size)):
        x = source.logits(at, buffer)
        columns = Columns.in_shard(ids[at], kernel, source.vocab)
        own = _capped(columns.take(x), head.cap, dtype)
        g_inside, g_outside, g_entropy = slopes
        given = SupportSlopes(g_inside[at], g_outside[at], None if g_entropy is None else g_entropy[at])
        found = stats.map(lambda t, at=at: t[at])  # type: ignore[misc]
        _put_gradient(source, kernel, at, x, columns, targets[at], found, own, given, head)


def _put_gradient(
    source: Source,
    kernel: RowKernel,
    at: slice,
    x: Tensor,
    columns: Columns,
    targets: Tensor,
    stats: RowStats,
    own: Tensor,
    slopes: SupportSlopes,
    head: Head,
) -> None:
    """Turns the logits of a chunk, rows `at`, into their gradient, which the source gets. `own` [n, K] are the
    support's logits as far as they are here."""
    g_inside = slopes.inside * capped_slope(own, head.cap) * head.scale
    g_rest, g_entropy = -slopes.outside * head.scale, slopes.entropy
    g_entropy = None if g_entropy is None else g_entropy * head.scale
    if source.dtype == torch.float16:  # whose chunks are multiplied before they are stored (chunks/sources.py)
        unit = source.magnify(_bound(stats, g_inside, g_rest, g_entropy))
        g_inside, g_rest = g_inside * unit, g_rest * unit
        g_entropy = None if g_entropy is None else g_entropy * unit
    kernel.grad_(x, targets, stats, g_rest, g_entropy, head.cap)
    columns.put_(x, g_inside)
    source.put(at, x)


def _bound(stats: RowStats, g_inside: Tensor, g_rest: Tensor, g_entropy: Tensor | None) -> Tensor:
    """Returns a bound that no entry of the gradient is above, in rows where all is finite."""
    found = g_rest.abs()
    if g_entropy is not None and stats.entropy is not None:
        found = found + g_entropy.abs() * (0.5 + stats.entropy)
    if g_inside.shape[1]:
        found = torch.maximum(found, g_inside.abs().amax(1))
    return torch.where(found.isfinite(), found, 0).amax()
