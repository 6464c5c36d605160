"""The engine `vllm` generates in the trainer's own process: one V1 engine beside the learner, on the same device.

The engine is built from the model's configuration alone; its weights come from the learner, at the start as after every
step. Prompts and expert prefixes go in as token ids, one sequence; rollouts of one context share its cached prefix. On
a GPU the engine gives its memory back while the learner needs it (`rest`, vLLM's sleep mode; no GPU has run that yet).
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from transformers import PreTrainedModel

from trapo.engines.protocol import Completion, Request, sequence_seed
from trapo.engines.vllm_sync import InProcess, WeightSync
from trapo.errors import TrapoError

CPU_CACHE_BYTES = 1 << 30  # of keys and values; `rollout.engine_args={kv_cache_memory_bytes: N}` changes it


class VLLMEngine:
    """Speaks the engine protocol over `vllm.LLM`.

    eos_ids: tokens that end a completion. max_tokens: of the longest context and its completion. engine_args: more
    arguments of vLLM's, which win over the ones here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_ids: Sequence[int],
        max_tokens: int,
        batch_size: int = 64,
        dtype: str | None = None,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        self.eos_ids = list(eos_ids)
        self.on_gpu = model.device.type == "cuda"
        self.resting = False
        arguments = {
            "dtype": dtype or str(model.dtype).removeprefix("torch."),
            "max_model_len": max_tokens,
            "max_num_seqs": batch_size,
            **(self._gpu_arguments() if self.on_gpu else self._cpu_arguments()),
            **(engine_args or {}),
        }
        self.llm = _make_llm(model, arguments)
        self.sync_weights: WeightSync = InProcess(self.llm, sleeps=self.on_gpu)
        self.sync(model)

    @staticmethod
    def _cpu_arguments() -> dict[str, Any]:
        # Compiling for every shape takes minutes that a run on a CPU does not get back.
        return {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}

    @staticmethod
    def _gpu_arguments() -> dict[str, Any]:
        return {"enable_sleep_mode": True, "gpu_memory_utilization": 0.4}

    def generate(self, requests: Sequence[Request], *, temperature: float, seed: int) -> list[Completion]:
        if not requests:
            return []
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                temperature=temperature,
                max_tokens=request.max_new_tokens,
                seed=sequence_seed(request, seed, index),
                stop_token_ids=self.eos_ids,
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )
            for index, request in enumerate(requests)
        ]
        prompts: list[Any] = [{"prompt_token_ids": list(request.context)} for request in requests]
        with _one_line_errors("generate"):
            outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        return [_completion(output.outputs[0]) for output in outputs]

    def rest(self) -> None:
        """Frees weights and cache until the next sync."""
        if self.on_gpu and not self.resting:
            self.llm.sleep(level=2)
            self.resting = True

    def sync(self, model: nn.Module) -> None:
        with _one_line_errors("take over the learner's weights"):
            self.sync_weights(model)
        self.resting = False


def _completion(output: Any) -> Completion:
    ids = tuple(output.token_ids)
    logprobs = tuple(step[token].logprob for token, step in zip(ids, output.logprobs, strict=True))
    return Completion(ids, output.finish_reason == "stop", logprobs)


def _make_llm(model: PreTrainedModel, arguments: dict[str, Any]) -> Any:
    """Returns a `vllm.LLM` in this process, with random weights, for the learner's architecture."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its progress would break the live display
    try:
        from vllm import LLM
    except ImportError as error:
        raise TrapoError(
            f"rollout.engine: vllm cannot be imported ({error}); on a CPU: make setup-vllm, on GPUs: pip install vllm"
        ) from error
    if dist.is_initialized() and dist.get_world_size() > 1:
        # One engine per rank of torchrun, each for itself.
        arguments = {"distributed_executor_backend": "external_launcher", **arguments}
    with tempfile.TemporaryDirectory() as folder, _one_line_errors("start"), _torch_left_alone():
        model.config.save_pretrained(folder)
        return LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            generation_config="vllm",  # a checkpoint's own sampling settings are not the policy
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, temperature included
            disable_log_stats=True,
            **arguments,
        )


@contextmanager
def _torch_left_alone() -> Iterator[None]:
    """Undoes what a CPU worker does: it replaces `torch.set_num_threads` for the whole process, which the learner is in
    too."""
    set_num_threads, level = torch.set_num_threads, logging.root.level
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        logging.root.setLevel(level)


@contextmanager
def _one_line_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except TrapoError:
        raise
    except Exception as error:  # vLLM's are of many kinds, and their text spans pages
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        raise TrapoError(f"rollout.engine: vLLM could not {doing}: {reason}") from error
