"""Row kernels: what a backend is. Everything else is shared.

A row kernel is a module (or object) with

    scratch_bytes(vocab, dtype, device) -> int
        what it allocates beside the logits, counted against the budget
    stats(logits [C, V], targets [C], cap, entropy) -> RowState
        the reduction of each row; leaves the logits as they are
    grad_(logits [C, V], targets [C], stats, g_lp [C], g_entropy [C] | None, cap) -> None
        the logits become g_lp (1[j=y] − π_j) − g_H π_j (log π_j + H), times the slope of the soft-cap, in place

and, where it can do both at once for the terms that `FusedTerms` can name,

    fused_(logits [C, V], targets [C], inputs, terms, scale, cap) -> RowStats
        stats; g_lp and g_H of the terms; grad_ with scale · g_lp and scale · g_H: one launch, the row read once

`logits` are x = scale · (h Wᵀ + b) before the soft-cap z = cap · tanh(x / cap) (cap None: z = x).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["FusedTerms", "FusedVerb", "RowInputs", "RowKernel", "RowState", "RowStats", "stats_dtype"]


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are fp32, and fp64 for fp64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class RowStats(NamedTuple):
    """What a row's loss and gradient need [C]. The log-sum-exp stays in two parts: π = e^(z − m) / Σ keeps its digits
    where |z| is large, e^(z − lse) does not."""

    logprobs: Tensor
    max: Tensor
    log_sum: Tensor
    entropy: Tensor | None

    def map(self, fn: Callable[[Tensor], Tensor]) -> RowStats:
        """The same with `fn` applied to every tensor."""
        entropy = None if self.entropy is None else fn(self.entropy)
        return RowStats(fn(self.logprobs), fn(self.max), fn(self.log_sum), entropy)

    def put(self, at: slice, found: RowStats) -> None:
        """Write what was found of the rows `at`."""
        for whole, part in zip(self, found, strict=True):
            if whole is not None and part is not None:
                whole[at] = part


class RowState(NamedTuple):
    """Online-softmax state of a row over the columns seen so far [C]; states of disjoint columns can be merged."""

    max: Tensor  # m = max z; −inf where there is no column, or none that is possible
    rest: Tensor  # Σ e^(z − m), but one column that has the maximum: beside its e^0 = 1 the others would lose digits
    dot: Tensor | None  # Σ e^(z − m) (z − m), where entropy was asked for
    target: Tensor  # z[y]

    def finish(self) -> RowStats:
        """logp = z_y − m − log Σ, H = log Σ − dot / Σ, with Σ = 1 + rest."""
        rest = self.rest + (self.max - self.max)  # NaN where the maximum is no number
        log_sum = rest.log1p()
        entropy = None if self.dot is None else (log_sum - self.dot / (1 + rest)).clamp(min=0)
        return RowStats((self.target - self.max) - log_sum, self.max, log_sum, entropy)


class RowInputs(NamedTuple):
    """The per-token constants [C] that an objective reads; None where the caller gave nothing. `weights` multiply the
    loss of each token; a row of weight 0 gets the gradient 0, whatever else it holds."""

    expert: Tensor  # bool
    advantages: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    weights: Tensor | None = None

    def at(self, rows: slice) -> RowInputs:
        expert, *others = (None if t is None else t[rows] for t in self)
        assert expert is not None
        return RowInputs(expert, *others)


class FusedTerms(NamedTuple):
    """An objective as kernels take it: numbers alone. The formulas are terms.py's, and tested against them."""

    expert: int  # Term.fused of the expert term, 0 = none
    policy: int  # of the policy term, 0 = none
    expert_coef: float
    alpha: float
    luffy_gamma: float
    clip_low: float  # lowest ratio: 0 = not clipped on that side
    clip_high: float  # highest ratio: inf = not clipped on that side
    dual_clip: float  # inf = none
    entropy_coef: float
    kl_coef: float
    tis_cap: float  # 0 = no weight


# fused_ of a row kernel
FusedVerb = Callable[[Tensor, Tensor, RowInputs, FusedTerms, float, float | None], RowStats]


class RowKernel(Protocol):
    """The verbs of a backend; see the module's docstring. `fused_` is optional."""

    def scratch_bytes(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int: ...

    def stats(self, logits: Tensor, targets: Tensor, cap: float | None, entropy: bool) -> RowState: ...

    def grad_(
        self,
        logits: Tensor,
        targets: Tensor,
        stats: RowStats,
        g_lp: Tensor,
        g_entropy: Tensor | None,
        cap: float | None,
    ) -> None: ...
