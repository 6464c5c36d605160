"""Teachers with a head of their own are here: another model, and the model itself with the expert trace in its context
(OPSD, arXiv 2601.18734; SDFT, 2601.19897; SDPO, 2601.20802)."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo.batching import collate, loss_tokens, micro_batches
from trapo.data.encode import EncodedProblem, PromptEncoder, decode_text
from trapo.distillation.known import States
from trapo.models import agreement
from trapo.models.loading import head_of
from trapo.models.precision import compute_in
from trapo.rollouts import Rollout

Reread = Callable[[Rollout], Rollout]  # the rollout as the teacher reads it


class ModelTeacher:
    """Reads rollouts with a model, which has no gradient. reread: the rollout with what stands before its response;
    None: as it is. budget: tokens of a forward, padding included."""

    def __init__(
        self, model: PreTrainedModel, *, precision: str, budget: int, pad_id: int, reread: Reread | None = None
    ) -> None:
        self.model, self.precision, self.budget, self.pad_id = model, precision, budget, pad_id
        self.reread = reread

    def prepare(self, rollouts: Sequence[Rollout]) -> None:
        """Does nothing: a micro-batch's states are computed when it is its turn."""

    @torch.no_grad()
    def know(self, rollouts: Sequence[Rollout]) -> States:
        """Returns the states [n, D'] of the tokens in the loss, rollout after rollout."""
        read = [self.reread(r) if self.reread else r for r in rollouts]
        found: dict[int, torch.Tensor] = {}
        with compute_in(self.precision, self.model):
            head = head_of(self.model)
            for chosen in micro_batches([len(r) for r in read], self.budget):
                batch = collate([read[i] for i in chosen], self.pad_id, self.model.device)
                hidden, cast = head.with_hidden(agreement.hidden_states(self.model, batch.input_ids))
                for i, row in zip(chosen, batch.rows(hidden), strict=True):
                    found[i] = row[len(row) - loss_tokens(read[i]) :]
        return States(torch.cat([found[i] for i in range(len(read))]), cast)


class Privileged:
    """Puts an expert trace into a rollout's prompt, by the template: its last message, whose text is {prompt}, becomes
    the template's. Of several traces a rollout's own tokens say which."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.encoder = PromptEncoder(tokenizer)
        self._prompts: dict[tuple[str, int], tuple[int, ...]] = {}

    def __call__(self, rollout: Rollout) -> Rollout:
        place = zlib.crc32(repr(rollout.own_ids).encode()) % len(rollout.problem.traces)
        ids = self.prompt(rollout.problem, place)
        return dataclasses.replace(rollout, problem=dataclasses.replace(rollout.problem, prompt_ids=ids))

    def prompt(self, encoded: EncodedProblem, place: int) -> tuple[int, ...]:
        """Returns the ids of the prompt with the trace of this number."""
        found = self._prompts.get((encoded.name, place))
        if found is None:
            problem, trace = encoded.problem, decode_text(self.tokenizer, encoded.traces[place].token_ids)
            *before, last = problem.prompt
            parts = self.template.split("{prompt}")
            text = last["content"].join(part.replace("{trace}", trace) for part in parts)
            found = self.encoder.encode(dataclasses.replace(problem, prompt=(*before, {**last, "content": text})))
            self._prompts[encoded.name, place] = found
        return found

    def longest(self, problems: Sequence[EncodedProblem]) -> int:
        """Returns the tokens of the longest prompt of all."""
        return max(len(self.prompt(p, i)) for p in problems for i in range(len(p.traces)))
