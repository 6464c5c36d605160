"""This file computes gradients that leave out what hardly counts, on a CPU: `grad_tolerance` of `linear_policy_loss`.

The mass of a chunk's logit gradient is M = Σ |dL/dz_cv| over its tokens c and rows v of the weight. Most of it lies in
few tokens (the confident ones have none) and few rows (those that no token finds likely have none). Once the statistics
of a chunk are known its masses are too, exactly and for about 3% of a GEMM where its logits wait for that, so before
GEMMs 2 and 3

    1. the tokens of least mass are left out, as long as all that was left out stays within ε/2 of all mass so far;
    2. of the tokens that remain, the rows of the weight of least mass, within what is left of ε;
    3. the GEMMs run on the tokens and rows that remain, gathered.

"So far" makes it one pass: at the end what was left out is at most ε of the whole, ‖ΔdL/dz‖₁ ≤ ε ‖dL/dz‖₁, and the
share that it is gets reported. The gradients of hidden and weight inherit it, since both are linear in dL/dz.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...chunks.sources import LinearSource
from ...head import Head
from ...stream import TwoSlopesOf
from ..base import RowStats
from .operands import BLOCK, PANEL, Keep, products_of

__all__ = ["Sparse"]

# Rows of the weight that are gathered at a time.
_BLOCK = 2048


class Sparse:
    """Accumulates the gradients of one loss, chunk after chunk; `left_out`: the share of the mass that was left out so
    far."""

    def __init__(self, source: LinearSource, head: Head) -> None:
        self.source, self.head = source, head
        self.mass = self.dropped = torch.zeros((), dtype=torch.float64, device=source.device)
        if source.d_hidden is not None:
            source.d_hidden.zero_()
        if source.d_weight is not None and not source.begin_sum():
            source.d_weight.zero_()

    @property
    def left_out(self) -> Tensor:
        return (self.dropped / self.mass.clamp(min=torch.finfo(torch.float64).tiny)).float()

    def add(self, at: slice, hidden: Tensor, keep: Keep, targets: Tensor, stats: RowStats, slopes: TwoSlopesOf) -> None:
        """Adds the gradients of a chunk of compact rows `at`, whose hidden states [C, D] these are."""
        scale = self.head.scale
        g_lp, g_entropy = slopes(at, stats)
        chunk = _Tokens(hidden, targets, stats, g_lp * scale, None if g_entropy is None else g_entropy * scale)
        by_row, by_token = self._masses(chunk, keep)
        self.mass = self.mass + by_token.sum()
        tokens, dropped = _keep(by_token, self._room(0.5))
        self.dropped = self.dropped + dropped
        if tokens.numel() < by_token.numel():
            by_row, _ = self._masses(chunk.alone(tokens), keep)
            chunk = chunk.take(tokens)
        rows, dropped = _keep(by_row, self._room(1.0))
        self.dropped = self.dropped + dropped
        if tokens.numel() and rows.numel():
            self._accumulate(chunk, keep, rows, at, tokens)

    def _room(self, share: float) -> Tensor:
        """Returns how much more mass may be left out when `share` of the tolerance may be used."""
        return (share * self.source.tolerance * self.mass - self.dropped).clamp(min=0)

    def _masses(self, chunk: _Tokens, keep: Keep) -> tuple[Tensor, Tensor]:
        """Returns the mass of each row of the weight [V] and of each token [C], float64."""
        source, head = self.source, self.head
        by_row, by_token = torch.ops.trapo_kernels_cpu.panel_mass(
            chunk.hidden, source.weight, source.bias, chunk.targets, head.scale, head.cap, *chunk.stats, chunk.g_lp,
            chunk.g_entropy, products_of(source.operands), keep.buffer, keep.references,
        )  # fmt: skip
        return by_row.double(), by_token.sum(0, dtype=torch.float64)

    def _accumulate(self, chunk: _Tokens, keep: Keep, rows: Tensor, at: slice, tokens: Tensor) -> None:
        """Computes GEMMs 2 and 3 of these rows of the weight, a block at a time."""
        source = self.source
        d_hidden = None if source.d_hidden is None else torch.zeros_like(chunk.hidden, dtype=source.wide)
        # Of a row of the weight, in its block.
        place = torch.full((source.vocab,), -1, dtype=torch.int64, device=source.device)
        for block in rows.split(_BLOCK):
            place[block] = torch.arange(block.numel(), device=source.device)
            weight = source.weight.index_select(0, block)
            bias = None if source.bias is None else source.bias.index_select(0, block)
            d_weight = None if source.d_weight is None else torch.empty_like(weight, dtype=source.wide)
            d_bias = None if source.d_bias is None else source.d_bias.new_zeros(block.numel())
            torch.ops.trapo_kernels_cpu.panel_grad_(
                chunk.hidden, weight, bias, place[chunk.targets], self.head.scale, self.head.cap, *chunk.stats,
                g_lp=chunk.g_lp,
                g_entropy=chunk.g_entropy,
                products=products_of(source.operands),
                at_once=_BLOCK,
                group=_BLOCK // PANEL,
                kept_in_d_weight=False,
                kept=_gathered(keep, block, tokens),
                references=None,
                d_hidden=d_hidden,
                d_weight=d_weight,
                d_bias=d_bias,
                accumulate_weight=False,
                accumulate_hidden=True,
            )  # fmt: skip
            place[block] = -1
            if source.d_weight is not None and d_weight is not None:
                source.d_weight.index_add_(0, block, d_weight)
            if source.d_bias is not None and d_bias is not None:
                source.d_bias.index_add_(0, block, d_bias)
        if source.d_hidden is not None and d_hidden is not None:
            where = tokens + at.start
            order = source.selection.order
            d_hidden = d_hidden.to(source.d_hidden.dtype)
            source.d_hidden.index_copy_(0, where if order is None else order[where], d_hidden)


def _gathered(keep: Keep, rows: Tensor, tokens: Tensor) -> Tensor | None:
    """Returns the logits of these rows of the weight and tokens as `Keep.buffer` has them; None where they have to be
    computed again: not all were kept, or in 16 bits, relative to a panel that these rows are none of."""
    if keep.buffer is None or keep.buffer.dtype != torch.float32 or tokens[-1] >= keep.buffer.shape[1] * BLOCK:
        return None
    found = keep.buffer[rows // PANEL, :, rows % PANEL].flatten(1).index_select(1, tokens)  # [R, T]
    found = F.pad(found, (0, -found.shape[1] % BLOCK, 0, -found.shape[0] % PANEL))
    return found.view(-1, PANEL, found.shape[1] // BLOCK, BLOCK).transpose(1, 2).contiguous()


class _Tokens:
    """Holds what a chunk's gradient is made of, one entry per token."""

    def __init__(
        self, hidden: Tensor, targets: Tensor, stats: RowStats, g_lp: Tensor, g_entropy: Tensor | None
    ) -> None:
        self.hidden, self.targets, self.stats, self.g_lp, self.g_entropy = hidden, targets, stats, g_lp, g_entropy

    def alone(self, tokens: Tensor) -> _Tokens:
        """Returns all of them, those that are not named with slopes of 0."""
        keep = torch.zeros_like(self.g_lp, dtype=torch.bool)
        keep[tokens] = True
        g_lp, g_entropy = (None if g is None else torch.where(keep, g, 0) for g in (self.g_lp, self.g_entropy))
        assert g_lp is not None
        return _Tokens(self.hidden, self.targets, self.stats, g_lp, g_entropy)

    def take(self, tokens: Tensor) -> _Tokens:
        g_entropy = None if self.g_entropy is None else self.g_entropy[tokens]
        return _Tokens(
            self.hidden[tokens], self.targets[tokens], self.stats.map(lambda t: t[tokens]), self.g_lp[tokens], g_entropy
        )


def _keep(masses: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (indices to keep, ascending; the mass that goes with the others): the least are left out while `room`
    holds them.

    A mass that is not a number is kept, and so is everything beside it that is larger.
    """
    order = masses.nan_to_num(nan=torch.inf).argsort(stable=True)
    sums = masses[order].cumsum(0)
    fits = int((sums <= room).sum())
    gone = sums[fits - 1] if fits else masses.new_zeros(())
    return order[fits:].sort().values, gone
