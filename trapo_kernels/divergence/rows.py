"""This file computes value and gradient of a divergence of two rows of logits, block by block in elementwise torch:
heads.py has the formulas. A block of rows takes four scratch blocks [block, V] and a mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..chunks.buffers import block_rows

__all__ = ["KINDS", "Rows", "scratch_bytes"]

KINDS = ("forward_kl", "reverse_kl", "jsd", "mixed")


def scratch_bytes(vocab: int, itemsize: int, device: torch.device) -> int:
    """Returns what a block takes."""
    return block_rows(vocab, device) * vocab * (4 * itemsize + 2)


def _blocks(x: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, four scratch blocks [4, rows, V]) over all rows; the scratch is reused."""
    rows, vocab = x.shape
    step = min(block_rows(vocab, x.device), max(rows, 1))
    scratch = x.new_empty(4, step, vocab, dtype=wide)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield slice(start, stop), scratch[:, : stop - start]


def _log_softmax(x: Tensor, cap: float | None, out: Tensor, spare: Tensor) -> Tensor:
    """Writes log π of a block of logits, before the soft-cap, to `out`."""
    out.copy_(x)
    if cap is not None:
        out.div_(cap).tanh_().mul_(cap)
    out.sub_(out.amax(1, keepdim=True))
    return out.sub_(torch.exp(out, out=spare).sum(1, keepdim=True).log_())


@dataclass(frozen=True)
class Rows:
    """Holds a chunk of rows: what their divergence is multiplied by [C], `scale` included in the gradient's factor."""

    kind: str
    beta: float
    cap: float | None
    ref_cap: float | None
    weights: Tensor

    def add(self, x: Tensor, r: Tensor, values: Tensor, share: float, into: Tensor | None, first: bool) -> None:
        """Adds share · D of the student's logits x from the reference's r [C, V] to `values` [C] and, unless None, the
        gradient of weights · share · D to `into` [C, V], which may be x; `first`: in place of what is there."""
        weights = self.weights * share
        for rows, (log_pi, log_p, a, b) in _blocks(x, values.dtype):
            _log_softmax(x[rows], self.cap, log_pi, a)
            _log_softmax(r[rows], self.ref_cap, log_p, a)
            found = share * _KERNELS[self.kind](self.beta, log_pi, log_p, a, b)
            values[rows] = found if first else values[rows] + found
            if into is None:
                continue
            a.mul_(weights[rows][:, None])  # dD/dz
            if self.cap is not None:  # dz/dx = 1 − tanh²(x / cap)
                a.addcmul_(a, b.copy_(x[rows]).div_(self.cap).tanh_().square_(), value=-1)
            into[rows] = a.to(x.dtype) if first else into[rows] + a


# Each gives D [block] and leaves dD/dz in `a`. Where a class has no probability, its logarithm of −∞ is masked.


def _forward_kl(beta: float, log_pi: Tensor, log_p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    torch.exp(log_p, out=b)
    torch.sub(log_p, log_pi, out=a).masked_fill_(b == 0, 0).mul_(b)
    value = a.sum(1)
    torch.exp(log_pi, out=a).sub_(b)
    return value


def _reverse_kl(beta: float, log_pi: Tensor, log_p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    torch.exp(log_pi, out=b)
    torch.sub(log_pi, log_p, out=a).masked_fill_(b == 0, 0)
    value = torch.mul(a, b, out=log_p).sum(1)
    a.sub_(value[:, None]).mul_(b)
    return value


def _mixed(beta: float, log_pi: Tensor, log_p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    torch.exp(log_p, out=b)
    forward = torch.sub(log_p, log_pi, out=a).masked_fill_(b == 0, 0).mul_(b).sum(1)
    gap, pi = torch.sub(log_pi, log_p, out=log_p), torch.exp(log_pi, out=log_pi)
    reverse = torch.mul(gap.masked_fill_(pi == 0, 0), pi, out=a).sum(1)
    gap.sub_(reverse[:, None]).mul_(pi).mul_(1 - beta)
    torch.sub(pi, b, out=a).mul_(beta).add_(gap)
    return beta * forward + (1 - beta) * reverse


def _jsd(beta: float, log_pi: Tensor, log_p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # log π/M = −log(1−β) − log(1 + β/(1−β) · p/π), and log p/M likewise: log π − log M would cancel.
    odds, zero = math.log(beta / (1 - beta)), b.new_zeros(())
    torch.sub(log_p, log_pi, out=b).add_(odds)
    torch.exp(log_p, out=a)
    torch.logaddexp(torch.neg(b, out=log_p), zero, out=log_p).masked_fill_(a == 0, 0)
    of_p = log_p.mul_(a).sum(1)
    torch.exp(log_pi, out=a)
    torch.logaddexp(b, zero, out=b).neg_().masked_fill_(a == 0, 0)  # log π/M + log(1−β)
    mean = torch.mul(a, b, out=log_pi).sum(1)
    a.mul_(b.sub_(mean[:, None])).mul_(1 - beta)
    return (1 - beta) * (mean - math.log(1 - beta)) - beta * (of_p + math.log(beta))


_KERNELS = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd, "mixed": _mixed}
