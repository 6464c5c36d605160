"""Generation with transformers' `generate` and its KV cache, on the learner's own weights.

Contexts are sorted by length and decoded in batches of `batch_size`. Rollouts of one prompt share their context, so
each distinct context is prefilled once and its cache repeated: a micro-group of four pays one prefill, not four.
Weights that FSDP2 has sharded are whole while a call generates.

Not every family's cache takes that. Before the first call a few tokens are generated and their logits compared with
those of forwards without a cache, one sequence at a time; the fastest way that agrees is taken.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from trapo.engines.protocol import Completion, Request
from trapo.errors import TrapoError
from trapo.models import agreement
from trapo.models.precision import compute_in
from trapo.models.sharding import whole_weights
from trapo_kernels.integrations.transformers import decoder_of


@dataclasses.dataclass(frozen=True)
class Way:
    """How contexts become completions."""

    prefill: bool = True  # by the decoder, before `generate`, which otherwise does it with a cache of its own making
    share: bool = True  # each distinct context once
    pad: bool = True  # contexts of different lengths in one batch
    cache: bool = True

    def __str__(self) -> str:
        slower = {
            "without sharing prompts": not self.share,
            "without padding": not self.pad,
            "without a cache": not self.cache,
        }
        return ", ".join(name for name, true in slower.items() if true)


WAYS = (  # fastest first
    Way(),
    Way(share=False),
    Way(prefill=False, share=False),
    Way(prefill=False, share=False, pad=False),
    Way(prefill=False, share=False, pad=False, cache=False),
)


class HFEngine:
    """Engine protocol over a transformers causal LM. `eos_ids`: tokens that end a completion."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        batch_size: int = 64,
        precision: str = "float32",  # of train.precision: what float32 weights compute in
    ) -> None:
        self.model = model
        self.precision = precision if model.dtype == torch.float32 else "float32"
        self.way: Way | None = None  # chosen by the first call
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
        torch.manual_seed(seed)
        with (
            _evaluating(self.model),
            whole_weights(self.model),
            torch.no_grad(),
            compute_in(self.precision, self.model),
        ):
            way = self.way = self.way or self._choose()
            for indices in self._batches(requests, way):
                batch = [requests[i] for i in indices]
                for i, completion in zip(indices, self._decode(batch, temperature, way), strict=True):
                    completions[i] = completion
        return [c for c in completions if c is not None]

    def _batches(self, requests: Sequence[Request], way: Way) -> Iterator[list[int]]:
        """Indices by length, so that little is padding, equal contexts side by side."""
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
        """New tokens [contexts, at most max_new_tokens]."""
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

    def _choose(self) -> Way:
        """The first of WAYS whose logits are those of forwards without a cache. Raises TrapoError if there is none."""
        contexts = [tuple(ids[0].tolist()) for ids in agreement.probe_ids(self.model)]
        asked, reasons = [c for c in contexts for _ in range(2)], []
        state = torch.get_rng_state()
        for way in WAYS:
            try:
                error, bound = self._error(asked, way)
            except agreement.FAILURES as failure:
                reasons.append(f"{type(failure).__name__}: {(str(failure).strip() or '-').splitlines()[0]}")
                continue
            if error <= bound:
                torch.set_rng_state(state)
                if str(way):
                    agreement.say(f"rollout.engine: {agreement.name_of(self.model)} generates {way} ({reasons[0]})")
                return way
            reasons.append(f"logits with a cache differ by {error:.2g} of their size")
        raise TrapoError(
            f"rollout.engine: {agreement.name_of(self.model)} cannot generate with engine hf: {reasons[0]}; "
            f"at last: {reasons[-1]}"
        )

    def _error(self, contexts: Sequence[tuple[int, ...]], way: Way) -> tuple[float, float]:
        """(difference of the logits of a few greedy tokens from those without a cache, what is accepted)."""
        settings = self._generation_config(0.0, PROBED)
        settings.eos_token_id = None
        worst, low = 0.0, False
        groups = [contexts] if way.pad else [[c for c in contexts if len(c) == n] for n in {len(c) for c in contexts}]
        for group in groups:
            seen = SeenLogits()
            tokens = self._generate(group, way, settings, LogitsProcessorList([seen]))
            done = {}
            for row, context in enumerate(group):
                ids = torch.tensor([[*context, *tokens[row].tolist()[:-1]]], device=self.model.device)
                key = tuple(ids[0].tolist())
                if key not in done:
                    done[key] = self.model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 :]
                found = torch.stack([scores[row] for scores in seen.scores])
                worst = max(worst, agreement.difference(found, done[key].float()))
                low = low or done[key].dtype != torch.float32 or self.precision != "float32"
        return worst, agreement.TOLERANCE["16 bits" if low else "float32"]

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
        """These settings in place of the checkpoint's. `generate` fills what a config leaves open from the model's own,
        and a repetition penalty there would sample from something other than the policy."""
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


PROBED = 3  # tokens that are generated before the first call


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
