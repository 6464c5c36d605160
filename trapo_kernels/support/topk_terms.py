"""These are the formulas of divergences from a teacher's top-k, on log-probabilities of a support.

With p the teacher and q the student on classes j, and P = Σ p, Q = Σ q over a token's ids:

    tail="bucket"        the ids and one class more, which holds 1 − P and 1 − Q
    tail="drop"          the ids alone, as they are: the rest of the vocabulary is not looked at
    tail="renormalise"   the ids alone, p / P and q / Q

    forward_kl   Σ p (log p − log q)
    reverse_kl   Σ q (log q − log p)
    jsd          β Σ p (log p − log m) + (1 − β) Σ q (log q − log m), m = β p + (1 − β) q
    mixed        β · forward_kl + (1 − β) · reverse_kl

With a bucket the gradient of forward_kl by the student's logits is q_j − p_j on the ids and q_j (P − Q) / (1 − Q) on
all others. The student's tail is summed by itself (rows.py); the teacher's is what its log-probabilities leave
of 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rows import SupportValues, normalize

__all__ = ["KINDS", "TAILS", "Teacher"]

KINDS = ("forward_kl", "reverse_kl", "jsd", "mixed")
TAILS = ("bucket", "drop", "renormalise")

# A sum of K fp32 log-probabilities says no more about what it leaves of 1. TRL has the same bound.
_LEAST_TAIL = math.log(1e-7)


@dataclass(frozen=True)
class Teacher:
    """Computes a divergence of compact rows from a teacher: log-probabilities [n, K] at the ids; an entry counts where
    it is `there` [n, K]. `open` [n]: there are classes beside the ids."""

    kind: str
    tail: str
    beta: float
    logprobs: Tensor
    there: Tensor
    open: Tensor

    @classmethod
    def of(cls, kind: str, tail: str, beta: float, logprobs: Tensor, ids: Tensor, vocab: int) -> Teacher:
        """Makes one of ids [n, K], none of which stands twice in a row; -1: none."""
        there = ids >= 0
        return cls(kind, tail, beta, logprobs, there, there.sum(1) < vocab)

    def map(self, take: Any) -> Teacher:
        return Teacher(self.kind, self.tail, self.beta, take(self.logprobs), take(self.there), take(self.open))

    def of_values(self, at: slice, values: SupportValues) -> Tensor:
        """Returns the divergence of each of the rows, whose `values` these are [C]."""
        return self.map(lambda t: t[at]).divergence(*normalize(values.inside, values.outside))

    def divergence(self, log_q: Tensor, log_q_tail: Tensor | None) -> Tensor:
        """Returns it of the student's log-probabilities [n, K] and its tail's log-mass [n], differentiable in both."""
        log_p = self.logprobs.to(log_q.dtype).masked_fill(~self.there, -torch.inf)
        log_q = log_q.masked_fill(~self.there, -torch.inf)
        least = None
        if self.tail == "renormalise":
            log_p = normalize(log_p, torch.where(self.there.any(1), -torch.inf, log_p.new_zeros(())))[0]
        elif self.tail == "bucket":
            assert log_q_tail is not None
            rest = torch.log1p(-log_p.exp().sum(1).clamp(max=1)).masked_fill(~self.open, -torch.inf)
            log_p = torch.cat([log_p, rest[:, None]], 1)
            # Of rows whose ids are all classes there is no tail.
            log_q = torch.cat([log_q, log_q_tail.masked_fill(~self.open, -torch.inf)[:, None]], 1)
            least = rest.clamp(min=_LEAST_TAIL).masked_fill(~self.open, -torch.inf)
        forward = self.kind in ("forward_kl", "mixed")
        if self.kind == "jsd":
            return _jsd(log_p, log_q, self.beta)
        total = _kl(log_p, log_q) if forward else log_q.new_zeros(log_q.shape[0])
        if self.kind == "forward_kl":
            return total
        known = log_p if least is None else torch.cat([log_p[:, :-1], least[:, None]], 1)
        reverse = _kl(log_q, known)
        return self.beta * total + (1 - self.beta) * reverse if forward else reverse


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Returns Σ a (log a − log b) [n]; a class with a = 0 gives 0, and nothing to the gradient."""
    none = log_a == -torch.inf
    return torch.where(none, 0, log_a.exp() * (log_a.masked_fill(none, 0) - log_b.masked_fill(none, 0))).sum(1)


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Computes β Σ p log p/m + (1 − β) Σ q log q/m [n]: log q/m = −log(1−β) − log(1 + β/(1−β) · p/q) does not
    cancel."""
    odds = math.log(beta / (1 - beta))
    no_p, no_q = log_p == -torch.inf, log_q == -torch.inf
    either, zero = no_p | no_q, log_q.new_zeros(())
    gap = log_p.masked_fill(either, 0) - log_q.masked_fill(either, 0)
    of_p = -torch.logaddexp(-gap - odds, zero).masked_fill(either, 0) - math.log(beta)
    of_q = -torch.logaddexp(gap + odds, zero).masked_fill(either, 0) - math.log(1 - beta)
    return (beta * log_p.exp() * of_p + (1 - beta) * log_q.exp() * of_q).sum(1)
