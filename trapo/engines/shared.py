"""The engines of all ranks act as one: each generates its part of the requests, and every rank gets all completions.

Each request brings the seed of its own random numbers, so that neither the number of ranks nor the engine's batch size
decides what is sampled. What is left to differ is rounding: a batch of another shape can give logits that differ in
their last bits, and a token whose two best candidates are that close would change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from trapo.data.sampling import derive_seed
from trapo.engines.protocol import Completion, Engine, Request
from trapo.runs.ranks import Ranks


class SharedEngine:
    """Speaks the engine protocol over this rank's `engine`; all ranks must ask for the same requests."""

    def __init__(self, engine: Engine, ranks: Ranks) -> None:
        self.engine, self.ranks = engine, ranks

    def generate(self, requests: Sequence[Request], *, temperature: float, seed: int) -> list[Completion]:
        seeded = [
            r if r.seed is not None else dataclasses.replace(r, seed=derive_seed(seed, i))
            for i, r in enumerate(requests)
        ]
        # Called without requests too: an engine on sharded weights gathers them on all ranks together.
        own = self.engine.generate(self.ranks.share(seeded), temperature=temperature, seed=seed)
        return self.ranks.gather(own)

    def rest(self) -> None:
        self.engine.rest()

    def sync(self, model: nn.Module) -> None:
        self.engine.sync(model)
