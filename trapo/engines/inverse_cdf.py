"""A token is sampled here with one uniform number a row.

The inverse of the cumulative distribution, in two levels: the sums of blocks of 256 probabilities say which block the
number falls in, the probabilities of that block which token. One pass over the logits for the softmax, one over the
probabilities for the sums of blocks; the sums run in float64, so that a token's chance is off by about 1e-7 of itself.
Noise for every token of the vocabulary, which `multinomial` takes, is the larger part of a step of a small model.
"""

from __future__ import annotations

import torch

from trapo.errors import TrapoError

BLOCK = 256  # probabilities
DRAWN = 64  # numbers at a time


class Draws:
    """Gives uniform numbers in [0, 1) of one sequence: the i-th depends on the seed and on i alone."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.left: list[float] = []

    def next(self) -> float:
        if not self.left:
            self.left = torch.rand(DRAWN, dtype=torch.float64, generator=self.generator).tolist()[::-1]
        return self.left.pop()


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Returns the likeliest token of each row: [B, V] -> [B]. Raises TrapoError for a row without one."""
    best, tokens = logits.max(-1)
    refuse_not_finite(best)
    return tokens


def sample(logits: torch.Tensor, temperature: float, uniform: torch.Tensor) -> torch.Tensor:
    """Returns one token a row from softmax(logits / temperature): logits [B, V], uniform [B] float64 in [0, 1) -> [B].

    Raises TrapoError for a row that is no distribution.
    """
    p = torch.softmax(logits.float() / temperature, -1)
    if p.shape[1] % BLOCK:
        p = torch.nn.functional.pad(p, (0, -p.shape[1] % BLOCK))
    blocks = p.view(len(p), -1, BLOCK)
    index, share = _invert(blocks.sum(-1, dtype=torch.float64).cumsum(-1), uniform)
    chosen = blocks[torch.arange(len(p), device=p.device), index]
    inner, _ = _invert(chosen.double().cumsum(-1), share)
    return index * BLOCK + inner


def _invert(sums: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sums [B, n], cumulated -> (which part uniform [B] times the whole falls in, how far into it, in [0, 1))."""
    whole = sums[:, -1:]
    refuse_not_finite(whole)
    # Below the whole, or the number would fall beyond the last part that is not empty.
    target = torch.minimum(uniform[:, None] * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    index = torch.searchsorted(sums, target, right=True)
    before = sums.gather(1, (index - 1).clamp(min=0)).masked_fill(index == 0, 0.0)
    share = ((target - before) / (sums.gather(1, index) - before)).clamp(0.0, 1.0 - 2.0**-53)
    return index[:, 0], share[:, 0]


def refuse_not_finite(values: torch.Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise TrapoError("rollout.engine: the model's logits are NaN or infinite: there is no token to choose")
