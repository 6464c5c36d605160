"""Generation engines behind one protocol. An engine knows token ids, not problems, prefixes or rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo.config import Config
from trapo.ranks import ALONE, Ranks


@dataclasses.dataclass(frozen=True)
class Request:
    context: tuple[int, ...]  # prompt ids, then the expert prefix if there is one
    max_new_tokens: int
    seed: int | None = None  # of this request's own random numbers; None: those of the whole call


@dataclasses.dataclass(frozen=True)
class Completion:
    token_ids: tuple[int, ...]  # the model's own tokens; the end-of-sequence token is the last one if it came
    finished: bool  # False: cut at max_new_tokens


class Engine(Protocol):
    def generate(self, requests: Sequence[Request], *, temperature: float, seed: int) -> list[Completion]:
        """One completion per request, in their order; temperature 0 is greedy. The same seed gives the same tokens.

        Either every request has a seed of its own, or none.
        """
        ...

    def sync(self, model: nn.Module) -> None:
        """Take over the learner's weights."""
        ...


def make_engine(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ranks: Ranks = ALONE
) -> Engine:
    """The engine that `rollout.engine` names (config.py has checked the name), shared by the ranks."""
    engine = _make_engine(config, model, tokenizer)
    if ranks.world == 1 and config.rollout.seeding == "call":
        return engine
    from trapo.rollout.shared import SharedEngine

    return SharedEngine(engine, ranks)


def _make_engine(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
    from trapo.model import eos_ids
    from trapo.rollout.hf import HFEngine

    return HFEngine(
        model,
        eos_ids=eos_ids(model, tokenizer),
        pad_id=tokenizer.pad_token_id,
        batch_size=config.rollout.batch_size,
    )
