"""Generation engines behind one protocol. An engine knows token ids, not problems, prefixes or rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo.config import Config
from trapo.precision import resolve
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
    logprobs: tuple[float, ...] | None = None  # of token_ids, as they were sampled; None: the engine gives none


class Engine(Protocol):
    def generate(self, requests: Sequence[Request], *, temperature: float, seed: int) -> list[Completion]:
        """One completion per request, in their order; temperature 0 is greedy. The same seed gives the same tokens.

        Either every request has a seed of its own, or none.
        """
        ...

    def rest(self) -> None:
        """Nothing will be generated before the next sync: the learner needs the device's memory."""
        ...

    def sync(self, model: nn.Module) -> None:
        """Take over the learner's weights."""
        ...


def sequence_seed(request: Request, seed: int, index: int) -> int:
    """A seed for each sequence of a call: rollouts of one context must differ. One that the request has wins."""
    return (seed * 1_000_003 + index) % 2**62 if request.seed is None else request.seed


def make_engine(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ranks: Ranks = ALONE
) -> Engine:
    """The engine that `rollout.engine` names (config.py has checked it), on the model; ranks share it."""
    engine = _make_engine(config, model, tokenizer)
    if ranks.world == 1 and config.rollout.seeding == "call":
        return engine
    from trapo.rollout.shared import SharedEngine

    return SharedEngine(engine, ranks)


def _make_engine(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
    from trapo.model import eos_ids

    rollout, ends = config.rollout, eos_ids(model, tokenizer)
    if rollout.engine == "vllm":
        from trapo.rollout.vllm import VLLMEngine

        longest = max(rollout.max_response_tokens, config.eval.max_response_tokens or 0)
        return VLLMEngine(
            model,
            eos_ids=ends,
            max_tokens=config.data.max_prompt_tokens + longest,
            batch_size=rollout.batch_size,
            dtype=rollout.dtype,
            engine_args=rollout.engine_args,
        )
    if rollout.engine == "vllm_server":
        from trapo.rollout.vllm_server import VLLMServerEngine

        assert rollout.server_url is not None  # config.py asks for it with this engine
        folder = Path(rollout.sync_folder or Path(config.run_dir) / ".tmp-server-weights")
        return VLLMServerEngine(
            rollout.server_url,
            model,
            eos_ids=ends,
            batch_size=rollout.batch_size,
            sync=rollout.weight_sync,
            folder=folder,
        )
    from trapo.rollout.hf import HFEngine

    return HFEngine(
        model,
        eos_ids=ends,
        pad_id=tokenizer.pad_token_id,
        batch_size=rollout.batch_size,
        precision=resolve(config.train.precision, model.device),
    )
