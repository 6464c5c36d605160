"""Generation with transformers' `generate` and its KV cache, on the learner's own weights.

Contexts are sorted by length and decoded in batches of `batch_size`. Rollouts of one prompt share their context, so
each distinct context is prefilled once and its cache repeated: a micro-group of four pays one prefill, not four.
Weights that FSDP2 has sharded are whole while a call generates.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from trapo.rollout import Completion, Request
from trapo.sharding import whole_weights


class HFEngine:
    """Engine protocol over a transformers causal LM. `eos_ids`: tokens that end a completion."""

    def __init__(self, model: PreTrainedModel, *, eos_ids: Sequence[int], pad_id: int, batch_size: int = 64) -> None:
        self.model = model
        self.eos_ids = list(eos_ids)
        self.pad_id = pad_id
        self.batch_size = batch_size
        # What transformers calls the argument, before and since 5.24.
        self.cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def rest(self) -> None:
        """Nothing to free: between calls there is no cache, and the weights are the learner's."""

    def sync(self, model: nn.Module) -> None:
        """Nothing to copy: the engine generates with the learner's module."""
        if model is not self.model:
            raise ValueError("HFEngine.sync: model must be the module that the engine was made with")

    def generate(self, requests: Sequence[Request], *, temperature: float, seed: int) -> list[Completion]:
        completions: list[Completion | None] = [None] * len(requests)
        was_training = self.model.training
        self.model.eval()
        torch.manual_seed(seed)
        with whole_weights(self.model):
            for indices in self._batches(requests):
                batch = [requests[i] for i in indices]
                for i, completion in zip(indices, self._decode(batch, temperature), strict=True):
                    completions[i] = completion
        self.model.train(was_training)
        return [c for c in completions if c is not None]

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Indices by length, so that little is padding, equal contexts side by side."""
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].context), requests[i].context))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    @torch.no_grad()
    def _decode(self, batch: Sequence[Request], temperature: float) -> list[Completion]:
        unique = list(dict.fromkeys(r.context for r in batch))
        rows = {context: row for row, context in enumerate(unique)}
        input_ids, attention_mask = self._left_pad(unique)
        cache = self._prefill(input_ids, attention_mask)
        repeat = torch.tensor([rows[r.context] for r in batch], device=input_ids.device)
        if len(unique) < len(batch):
            cache.batch_select_indices(repeat)
        budget = max(r.max_new_tokens for r in batch)
        generate = cast(Callable[..., torch.Tensor], self.model.generate)  # its own annotation does not type-check
        own = [r.seed for r in batch if r.seed is not None] if temperature > 0 else []
        noise = [OwnNoise(own, temperature, input_ids.device)] if own else []
        with self._own_settings(0.0 if own else temperature, budget):
            generated = generate(
                input_ids=input_ids[repeat],
                attention_mask=attention_mask[repeat],
                logits_processor=LogitsProcessorList(noise),
                synced_gpus=False,  # each rank decodes by itself: see whole_weights
                **{self.cache_name: cache},
            )
        new_tokens = generated[:, input_ids.shape[1] :].tolist()
        return [self._trim(ids, r.max_new_tokens) for ids, r in zip(new_tokens, batch, strict=True)]

    def _left_pad(self, contexts: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """ids, mask: [unique contexts, longest], padded on the left so that all end in the same column."""
        width = max(len(c) for c in contexts)
        ids = [[self.pad_id] * (width - len(c)) + list(c) for c in contexts]
        mask = [[0] * (width - len(c)) + [1] * len(c) for c in contexts]
        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> DynamicCache:
        """Keys and values of all but the last column, which `generate` runs itself to get the first logits."""
        cache = DynamicCache(config=self.model.config)
        if input_ids.shape[1] > 1:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            decoder: nn.Module = self.model.get_decoder()
            decoder(
                input_ids=input_ids[:, :-1],
                attention_mask=attention_mask[:, :-1],
                position_ids=positions[:, :-1],
                **{self.cache_name: cache},
                use_cache=True,
            )
        return cache

    @contextmanager
    def _own_settings(self, temperature: float, max_new_tokens: int) -> Iterator[None]:
        """These settings in place of the checkpoint's. `generate` fills what a config leaves open from the model's own,
        and a repetition penalty there would sample from something other than the policy."""
        checkpoints = self.model.generation_config
        self.model.generation_config = self._generation_config(temperature, max_new_tokens)
        try:
            yield
        finally:
            self.model.generation_config = checkpoints

    def _generation_config(self, temperature: float, max_new_tokens: int) -> GenerationConfig:
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature > 0
            else {"do_sample": False}
        )
        return GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=self.eos_ids, pad_token_id=self.pad_id, **sampling
        )

    def _trim(self, ids: list[int], max_new_tokens: int) -> Completion:
        """Cut after the first end-of-sequence token or at the request's own limit, whichever comes first."""
        ids = ids[:max_new_tokens]
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        if end is None:
            return Completion(tuple(ids), finished=False)
        return Completion(tuple(ids[: end + 1]), finished=True)


class OwnNoise(LogitsProcessor):
    """Samples each row with random numbers of its own: the largest of z / temperature + Gumbel noise is a sample of the
    softmax, so greedy decoding of what this returns samples. seeds: one per row."""

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [B, V] -> [B, V] fp32."""
        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self.temperature - noise.log()
