"""This file makes the engine that a run generates with."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo.engines.protocol import Engine
from trapo.models.precision import resolve
from trapo.runs.ranks import ALONE, Ranks
from trapo.settings.groups import RolloutConfig


def make_engine(
    rollout: RolloutConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    precision: str,
    run_dir: Path,
    ranks: Ranks = ALONE,
) -> Engine:
    """Returns the engine that `rollout.engine` names (config.py has checked it), on the model; ranks share it.

    max_tokens: of a prompt and its response together. precision: as train.precision. run_dir: where weights go that a
    server reads, unless rollout.sync_folder says.
    """
    engine = _make_engine(rollout, model, tokenizer, max_tokens, precision, run_dir)
    if ranks.world == 1 and rollout.seeding == "call":
        return engine
    from trapo.engines.shared import SharedEngine

    return SharedEngine(engine, ranks)


def _make_engine(
    rollout: RolloutConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    precision: str,
    run_dir: Path,
) -> Engine:
    from trapo.models.loading import eos_ids

    ends = eos_ids(model, tokenizer)
    if rollout.engine == "vllm":
        from trapo.engines.vllm import VLLMEngine

        return VLLMEngine(
            model,
            eos_ids=ends,
            max_tokens=max_tokens,
            batch_size=rollout.batch_size,
            dtype=rollout.dtype,
            engine_args=rollout.engine_args,
        )
    if rollout.engine == "vllm_server":
        from trapo.engines.vllm_server import VLLMServerEngine

        assert rollout.server_url is not None  # config.py asks for it with this engine
        folder = Path(rollout.sync_folder or run_dir / ".tmp-server-weights")
        return VLLMServerEngine(
            rollout.server_url,
            model,
            eos_ids=ends,
            batch_size=rollout.batch_size,
            sync=rollout.weight_sync,
            folder=folder,
        )
    from trapo.engines.hf import HFEngine
    from trapo.engines.truncation import Truncation

    return HFEngine(
        model,
        eos_ids=ends,
        pad_id=tokenizer.pad_token_id,
        batch_size=rollout.batch_size,
        precision=resolve(precision, model.device),
        truncation=None
        if rollout.top_k is None
        else Truncation(rollout.top_k, rollout.top_p or 1.0, rollout.min_p or 0.0),
    )
