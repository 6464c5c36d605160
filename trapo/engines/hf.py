"""The engine `hf` generates in the trainer's process, on the learner's own weights.

Two loops can do it: our own around transformers' model code (own_loop.py), and transformers' `generate`
(transformers_loop.py), which knows caches that ours does not. Weights that FSDP2 has sharded are whole while a call
generates.

Not every family is right in every way. Before the first call a few tokens are generated and their logits compared with
those of forwards without a cache, one sequence at a time; the fastest way that agrees is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from trapo.engines.own_loop import OwnLoop
from trapo.engines.protocol import Completion, Request, sequence_seed
from trapo.engines.transformers_loop import TransformersLoop
from trapo.engines.truncation import Truncation
from trapo.engines.ways import WAYS, Way
from trapo.engines.weight_marks import mark
from trapo.errors import TrapoError
from trapo.models import agreement
from trapo.models.precision import compute_in
from trapo.models.sharding import is_sharded, whole_weights


class HFEngine:
    """Speaks the engine protocol over a transformers causal LM. `eos_ids`: tokens that end a completion."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        batch_size: int = 64,
        precision: str = "float32",  # of train.precision: what float32 weights compute in
        truncation: Truncation | None = None,  # of requests that ask for it
    ) -> None:
        self.model = model
        self.precision = precision if model.dtype == torch.float32 else "float32"
        self.truncation = truncation
        self.way: Way | None = None  # chosen by the first call
        self.own = OwnLoop(model, eos_ids=eos_ids, pad_id=pad_id, batch_size=batch_size)
        self.transformers = TransformersLoop(model, eos_ids=eos_ids, pad_id=pad_id, batch_size=batch_size)

    def rest(self) -> None:
        """Gives up packed weights and kept prompts; the weights are the learner's."""
        self.own.forget()

    def sync(self, model: nn.Module) -> None:
        """Copies nothing: the engine generates with the learner's module."""
        if model is not self.model:
            raise ValueError("HFEngine.sync: model must be the module that the engine was made with")
        self.own.forget()

    def generate(self, requests: Sequence[Request], *, temperature: float, seed: int) -> list[Completion]:
        torch.manual_seed(seed)
        self.own.check_weights(mark(self.model))
        with (
            _evaluating(self.model),
            whole_weights(self.model),
            torch.no_grad(),
            compute_in(self.precision, self.model),
        ):
            way = self.way = self.way or self._choose()
            truncation = self.truncation if any(r.truncated for r in requests) else None
            if not way.own:
                if truncation is not None:
                    name = agreement.name_of(self.model)
                    raise TrapoError(f"rollout.top_k: {name} generates {way}, which does not say what it samples from")
                return self.transformers.decode(requests, temperature, way)
            seeds = [sequence_seed(request, seed, i) for i, request in enumerate(requests)]
            completions = self.own.decode(requests, temperature=temperature, seeds=seeds, truncation=truncation)
        if is_sharded(self.model):  # a rank has room for its own part alone
            self.own.packed.clear()
        return completions

    def _choose(self) -> Way:
        """Returns the first of WAYS whose logits are those of forwards without a cache. Raises TrapoError if there is
        none."""
        reasons = []
        state = torch.get_rng_state()
        for way in WAYS:
            try:
                error, bound = self._error(way)
            except (*agreement.FAILURES, TrapoError) as failure:
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

    def _error(self, way: Way) -> tuple[float, float]:
        """Returns (difference of the logits of a few greedy tokens from those without a cache, what is accepted)."""
        contexts = [tuple(ids[0].tolist()) for ids in agreement.probe_ids(self.model)]
        worst, low = 0.0, False
        done: dict[tuple[int, ...], torch.Tensor] = {}
        for context, tokens, found in self._probed(contexts, way):
            key = (*context, *tokens[:-1])
            if key not in done:
                ids = torch.tensor([key], device=self.model.device)
                done[key] = self.model(input_ids=ids, use_cache=False).logits[0]
            worst = max(worst, agreement.difference(found, done[key][len(context) - 1 :].float()))
            low = low or done[key].dtype != torch.float32 or self.precision != "float32"
        return worst, agreement.TOLERANCE["16 bits" if low else "float32"]

    def _probed(
        self, contexts: Sequence[tuple[int, ...]], way: Way
    ) -> list[tuple[tuple[int, ...], list[int], torch.Tensor]]:
        """Returns (context, a few greedy tokens, the logits that they were chosen by), of each context twice."""
        asked = [context for context in contexts for _ in range(2)]
        if way.own:
            return self.own.probe(asked, PROBED)
        seen = self.transformers.seen(asked, PROBED, way)
        return [(context, tokens, logits) for context, (tokens, logits) in zip(asked, seen, strict=True)]


PROBED = 3  # tokens that are generated before the first call


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
