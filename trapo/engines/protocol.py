"""Generation engines stand behind one protocol. An engine knows token ids, not problems, prefixes or rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from torch import nn


@dataclasses.dataclass(frozen=True)
class Request:
    context: tuple[int, ...]  # prompt ids, then the expert prefix if there is one
    max_new_tokens: int
    seed: int | None = None  # of this request's own random numbers; None: those of the whole call
    truncated: bool = False  # sampled as rollout.top_k, top_p and min_p say; else from the whole distribution
    keep: bool = False  # contexts that begin with this one will be asked for before the next sync


@dataclasses.dataclass(frozen=True)
class Completion:
    token_ids: tuple[int, ...]  # the model's own tokens; the end-of-sequence token is the last one if it came
    finished: bool  # False: cut at max_new_tokens
    logprobs: tuple[float, ...] | None = None  # of token_ids, as they were sampled; None: the engine gives none
    supports: tuple[tuple[int, ...], ...] | None = None  # the ids that each was sampled from; None: from all


class Engine(Protocol):
    def generate(self, requests: Sequence[Request], *, temperature: float, seed: int) -> list[Completion]:
        """Returns one completion per request, in their order; temperature 0 is greedy. The same seed gives the same
        tokens.

        Either every request has a seed of its own, or none.
        """
        ...

    def rest(self) -> None:
        """Is told that nothing will be generated before the next sync: the learner needs the device's memory."""
        ...

    def sync(self, model: nn.Module) -> None:
        """Take over the learner's weights."""
        ...


def sequence_seed(request: Request, seed: int, index: int) -> int:
    """Returns a seed for each sequence of a call: rollouts of one context must differ. One that the request has
    wins."""
    return (seed * 1_000_003 + index) % 2**62 if request.seed is None else request.seed
