"""This file says what a backend is: a `RowKernel`. Everything else is shared.

Two verbs are needed, the reduction of each row of a chunk of logits and its gradient in place; all other abilities have
a default, which is not to have them. `logits` are x = scale · (h Wᵀ + b) before the soft-cap z = cap · tanh(x / cap)
(cap None: z = x).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ..chunks import products

if TYPE_CHECKING:
    from ..chunks.sources import Source
    from ..head import Head
    from ..shards.vocab_parallel import Shard

__all__ = ["FusedTerms", "FusedVerb", "Passes", "RowInputs", "RowKernel", "RowState", "RowStats", "stats_dtype"]
__all__ += ["TargetLogitsVerb"]


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of statistics: fp32, and fp64 for fp64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# e^-1e4 is 0 in fp64 too; 0 · −∞ is not.
_FLOOR = -1e4
# e^80 is a number in fp32.
_FURTHEST = 80.0


class RowStats(NamedTuple):
    """Holds what a row's loss and gradient need [C]. The log-sum-exp stays in two parts: π = e^(z − m) / Σ keeps its
    digits where |z| is large, e^(z − lse) does not."""

    logprobs: Tensor
    max: Tensor
    log_sum: Tensor
    entropy: Tensor | None

    @property
    def target_logits(self) -> Tensor:
        """Returns z_y [C]."""
        return self.logprobs + (self.max + self.log_sum)

    def map(self, fn: Callable[[Tensor], Tensor]) -> RowStats:
        """Returns the statistics with `fn` applied to every tensor."""
        entropy = None if self.entropy is None else fn(self.entropy)
        return RowStats(fn(self.logprobs), fn(self.max), fn(self.log_sum), entropy)

    @classmethod
    def empty(cls, rows: int, dtype: torch.dtype, device: torch.device, entropy: bool) -> RowStats:
        """Returns room for the statistics of so many rows."""
        vectors = [torch.empty(rows, dtype=dtype, device=device) for _ in range(3 + entropy)]
        return cls(vectors[0], vectors[1], vectors[2], vectors[3] if entropy else None)

    def put(self, at: slice, found: RowStats) -> RowStats:
        """Puts the statistics that were `found` of the rows `at` among these: written in place, or, of all rows, the
        very ones."""
        if found.logprobs.shape == self.logprobs.shape:
            return found
        for whole, part in zip(self, found, strict=True):
            if whole is not None and part is not None:
                whole[at] = part
        return self


class RowState(NamedTuple):
    """Holds the online-softmax state of a row over the columns seen so far [C]; states of disjoint columns can be
    merged."""

    max: Tensor  # m = max z; −inf where there is no column, or none that is possible
    rest: Tensor  # Σ e^(z − m), but one column that has the maximum: beside its e^0 = 1 the others would lose digits
    dot: Tensor | None  # Σ e^(z − m) (z − m), where entropy was asked for
    target: Tensor  # z[y]

    def finish(self) -> RowStats:
        """Computes logp = z_y − m − log Σ, H = log Σ − dot / Σ, with Σ = 1 + rest."""
        rest = self.rest + (self.max - self.max)  # NaN where the maximum is no number
        log_sum = rest.log1p()
        entropy = None if self.dot is None else (log_sum - self.dot / (1 + rest)).clamp(min=0)
        return RowStats((self.target - self.max) - log_sum, self.max, log_sum, entropy)

    def with_target(self, target: Tensor) -> RowState:
        """Returns the state where z_y is `target` [C] and not the rounded logit that was read: row_math.h has the same.
        Where the target is the column that is left out, the others are all that there is in `rest`, so that none of
        their digits are lost; elsewhere its share in the sums is exchanged."""
        rounded = (self.target - self.max).clamp(min=_FLOOR)
        share = rounded.exp()
        held = (self.target >= self.max) | (self.rest < share / 2)
        # Rounding may have moved a huge logit further than an exponential reaches.
        target = torch.where(held, torch.maximum(target, self.max - _FURTHEST), target)
        top = torch.where(held, target, self.max)
        by = (self.max - top).masked_fill(~held, 0)
        others = torch.where(held, self.rest, (self.rest - share).clamp(min=0))
        below = (target - top).clamp(min=_FLOOR)
        new = below.exp().masked_fill(held, 0)
        dot = self.dot
        if dot is not None:
            dot = torch.where(held, dot + by * others, dot - share * rounded)
            dot = by.exp() * dot + new * below
        return RowState(top, by.exp() * others + new, dot, target)


class RowInputs(NamedTuple):
    """Holds the per-token constants [C] that an objective reads; None where the caller gave nothing. `weights` multiply
    the loss of each token; a row of weight 0 gets the gradient 0, whatever else it holds. `target_logits` are z_y where
    they are known better than from the logits, which are rounded (`RowState.with_target`)."""

    expert: Tensor  # bool
    advantages: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    weights: Tensor | None = None
    target_logits: Tensor | None = None

    def at(self, rows: slice) -> RowInputs:
        expert, *others = (None if t is None else t[rows] for t in self)
        assert expert is not None
        return RowInputs(expert, *others)


class FusedTerms(NamedTuple):
    """Is an objective as kernels take it: numbers alone. The formulas are terms.py's, and tested against them."""

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


# The verbs of a row kernel --------------------------------------------------------------------------------------


class ScratchBytes(Protocol):
    """Says what a kernel allocates beside the logits; it counts against the budget."""

    def __call__(self, vocab: int, dtype: torch.dtype, device: torch.device) -> int: ...


class StatsVerb(Protocol):
    """Reduces each row of logits [C, V], which stay as they are; `entropy`: with the state's `dot`."""

    def __call__(self, logits: Tensor, targets: Tensor, cap: float | None, entropy: bool) -> RowState: ...


class GradVerb(Protocol):
    """Turns the logits [C, V] into g_lp (1[j=y] − π_j) − g_H π_j (log π_j + H), times the slope of the soft-cap, in
    place; g_lp [C], and g_H [C] or None."""

    def __call__(
        self,
        logits: Tensor,
        targets: Tensor,
        stats: RowStats,
        g_lp: Tensor,
        g_entropy: Tensor | None,
        cap: float | None,
    ) -> None: ...


class FusedVerb(Protocol):
    """Computes statistics, g_lp and g_H of the terms, and the gradient for scale · g_lp and scale · g_H in place of the
    logits [C, V]: one launch."""

    def __call__(
        self, logits: Tensor, targets: Tensor, inputs: RowInputs, terms: FusedTerms, scale: float, cap: float | None
    ) -> RowStats: ...


class TargetLogitsVerb(Protocol):
    """Computes scale · (h · W[y] + b[y]) in fp32 [C], of 16-bit hidden [C, D], weight [V, D] and bias [V] or None."""

    def __call__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float
    ) -> Tensor: ...


class LinearStatsVerb(Protocol):
    """Computes statistics straight from hidden [N, D], weight [V, D] and bias [V] or None, without writing a logit;
    None: not for these operands."""

    def __call__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, entropy: bool
    ) -> RowStats | None: ...


def no_scratch(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Returns `scratch_bytes` of a kernel that allocates nothing of the size of logits."""
    return 0


@dataclass(frozen=True)
class Passes:
    """Is a chunk loop that a backend has in place of stream.py's, for the sources that it `takes`; `forward` and
    `backward` take and give what those of stream.py do, for losses without slopes in the target's logit.

        forward(loop, entropy, slopes or None) -> statistics        backward(loop, statistics, slopes)

    `rounds_once`: it knows `LinearSource.round_once`.
    """

    takes: Callable[[Source], bool]
    forward: Callable[..., RowStats]
    backward: Callable[..., None]
    rounds_once: bool = False


@dataclass(frozen=True)
class RowKernel:
    """Declares everything that a backend can do; what looks for an ability reads it here.

    Args:
        stats: the reduction of each row.
        grad_: the gradient in place of the logits.
        scratch_bytes: what the two allocate beside the logits, in bytes.
        fused_: both at once, for the terms that `FusedTerms` can name; the row is read once.
        fused_float64: `fused_` keeps float64's digits.
        target_logits: the logits of the targets alone, in fp32, of heads whose logits are rounded.
        linear_stats: statistics without logits, where nothing but statistics is asked for.
        by_columns: its recomputing backward runs over blocks of the vocabulary (chunks/columns.py) where that pays.
        passes: a chunk loop of its own, for the sources that it takes.
        shard: the part of the vocabulary that it holds; None: all. Targets are ids in the whole vocabulary.
    """

    stats: StatsVerb
    grad_: GradVerb
    scratch_bytes: ScratchBytes = no_scratch
    fused_: FusedVerb | None = None
    fused_float64: bool = True
    target_logits: TargetLogitsVerb = products.target_logits
    linear_stats: LinearStatsVerb | None = None
    by_columns: bool = False
    passes: Passes | None = None
    shard: Shard | None = None
