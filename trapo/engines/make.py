"""Which engine a run generates with."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo.config import Config
from trapo.engines.protocol import Engine
from trapo.models.precision import resolve
from trapo.runs.ranks import ALONE, Ranks


def make_engine(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ranks: Ranks = ALONE
) -> Engine:
    """The engine that `rollout.engine` names (config.py has checked it), on the model; ranks share it."""
    engine = _make_engine(config, model, tokenizer)
    if ranks.world == 1 and config.rollout.seeding == "call":
        return engine
    from trapo.engines.shared import SharedEngine

    return SharedEngine(engine, ranks)


def _make_engine(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
    from trapo.models.loading import eos_ids

    rollout, ends = config.rollout, eos_ids(model, tokenizer)
    if rollout.engine == "vllm":
        from trapo.engines.vllm import VLLMEngine

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
        from trapo.engines.vllm_server import VLLMServerEngine

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
    from trapo.engines.hf import HFEngine

    return HFEngine(
        model,
        eos_ids=ends,
        pad_id=tokenizer.pad_token_id,
        batch_size=rollout.batch_size,
        precision=resolve(config.train.precision, model.device),
    )
