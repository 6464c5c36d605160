"""This file generates with transformers' `generate` and its own cache, for families that own_loop.py is not right for.

Contexts are sorted by length and decoded in batches. Rollouts of one prompt share their context, so each distinct
context is prefilled once and its cache repeated: a micro-group of four pays one prefill, not four. Not every family's
cache takes that; a `Way` says what is gone without.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from trapo.engines.protocol import Completion, Request
from trapo.engines.ways import Way
from trapo_kernels.integrations.transformers import decoder_of


class TransformersLoop:
    """Decodes requests with `model.generate`. `eos_ids`: tokens that end a completion."""

    def __init__(self, model: PreTrainedModel, *, eos_ids: Sequence[int], pad_id: int, batch_size: int) -> None:
        self.model = model
        self.eos_ids = list(eos_ids)
        self.pad_id = pad_id
        self.batch_size = batch_size
        self.cache_name = cache_name(model)

    def decode(self, requests: Sequence[Request], temperature: float, way: Way) -> list[Completion]:
        """Returns one completion per request, in their order."""
        completions: list[Completion | None] = [None] * len(requests)
        for indices in self._batches(requests, way):
            batch = [requests[i] for i in indices]
            for i, completion in zip(indices, self._decode(batch, temperature, way), strict=True):
                completions[i] = completion
        return [c for c in completions if c is not None]

    def seen(self, contexts: Sequence[tuple[int, ...]], count: int, way: Way) -> list[tuple[list[int], torch.Tensor]]:
        """Returns (`count` greedy tokens, the logits [count, V] that they were chosen by) of each context."""
        settings = self._generation_config(0.0, count)
        settings.eos_token_id = None
        lengths = [0] if way.pad else sorted({len(c) for c in contexts})
        found: list[tuple[list[int], torch.Tensor]] = [([], torch.empty(0))] * len(contexts)
        for length in lengths:
            rows = [i for i, context in enumerate(contexts) if way.pad or len(context) == length]
            seen = SeenLogits()
            tokens = self._generate([contexts[i] for i in rows], way, settings, LogitsProcessorList([seen]))
            for row, i in enumerate(rows):
                found[i] = tokens[row].tolist(), torch.stack([scores[row] for scores in seen.scores])
        return found

    def _batches(self, requests: Sequence[Request], way: Way) -> Iterator[list[int]]:
        """Yields the indices by length, so that little is padding, equal contexts side by side."""
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].context), requests[i].context))
        start = 0
        while start < len(order):
            length = len(requests[order[start]].context)
            batch = order[start : start + self.batch_size]
            batch = [i for i in batch if way.pad or len(requests[i].context) == length]
            yield batch
            start += len(batch)

    def _decode(self, batch: Sequence[Request], temperature: float, way: Way) -> list[Completion]:
        budget = max(r.max_new_tokens for r in batch)
        own = [r.seed for r in batch if r.seed is not None] if temperature > 0 else []
        noise = [OwnNoise(own, temperature, self.model.device)] if own else []
        settings = self._generation_config(0.0 if own else temperature, budget)
        generated = self._generate([r.context for r in batch], way, settings, LogitsProcessorList(noise))
        return [self._trim(ids, r.max_new_tokens) for ids, r in zip(generated.tolist(), batch, strict=True)]

    def _generate(
        self, contexts: Sequence[tuple[int, ...]], way: Way, settings: GenerationConfig, noise: LogitsProcessorList
    ) -> torch.Tensor:
        """Returns the new tokens [contexts, at most max_new_tokens]."""
        unique = list(dict.fromkeys(contexts)) if way.share else list(contexts)
        rows = {context: row for row, context in enumerate(unique)}
        ids, mask = self._left_pad(unique)
        cached: dict[str, Any] = {} if way.cache else {"use_cache": False}
        cache = self._prefill(ids, mask) if way.prefill else None
        if len(unique) < len(contexts):
            repeat = torch.tensor([rows[context] for context in contexts], device=ids.device)
            ids, mask = ids[repeat], mask[repeat]
            if cache is not None:
                select_rows(cache, repeat)
        if cache is not None:
            cached[self.cache_name] = cache
        generate = cast(Callable[..., torch.Tensor], self.model.generate)  # its own annotation does not type-check
        with self._own_settings(settings):
            found = generate(
                input_ids=ids,
                attention_mask=mask,
                logits_processor=noise,
                synced_gpus=False,  # each rank decodes by itself: see whole_weights
                **cached,
            )
        return found[:, ids.shape[1] :]

    def _left_pad(self, contexts: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids, mask: [unique contexts, longest], padded on the left so that all end in the same column."""
        width = max(len(c) for c in contexts)
        ids = [[self.pad_id] * (width - len(c)) + list(c) for c in contexts]
        mask = [[0] * (width - len(c)) + [1] * len(c) for c in contexts]
        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> DynamicCache:
        """Returns the keys and values of all but the last column, which `generate` runs itself to get the first
        logits."""
        cache = DynamicCache(config=self.model.config)
        if input_ids.shape[1] > 1:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            decoder_of(self.model)(
                input_ids=input_ids[:, :-1],
                attention_mask=attention_mask[:, :-1],
                position_ids=positions[:, :-1],
                **{self.cache_name: cache},
                use_cache=True,
            )
        return cache

    @contextmanager
    def _own_settings(self, settings: GenerationConfig) -> Iterator[None]:
        """Puts these settings in place of the checkpoint's. `generate` fills what a config leaves open from the model's
        own, and a repetition penalty there would sample from something other than the policy."""
        checkpoints = self.model.generation_config
        self.model.generation_config = settings
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


def cache_name(model: PreTrainedModel) -> str:
    """Returns what transformers calls a forward's cache, before and since 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def select_rows(cache: DynamicCache, rows: torch.Tensor) -> None:
    """Make these rows, repeated at will, the batch of a cache. `batch_select_indices` of transformers' layers with a
    recurrent or convolution state is missing, or selects of the keys and values alone."""
    for layer in cache.layers:
        if hasattr(layer, "conv_states") or not hasattr(layer, "batch_select_indices"):
            layer.reorder_cache(cast(torch.LongTensor, rows))
        else:
            layer.batch_select_indices(rows)


class SeenLogits(LogitsProcessor):
    """Keeps what it is given, step by step."""

    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [B, V] -> the same."""
        self.scores.append(scores.clone())
        return scores


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
