"""Teachers with a head of their own are here: another model, and the model itself with the expert trace in its context
(OPSD, arXiv 2601.18734; SDFT, 2601.19897; SDPO, 2601.20802)."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo.batching import Batch, collate, filler, loss_tokens, micro_batches
from trapo.data.encode import EncodedProblem, PromptEncoder, decode_text
from trapo.distillation.known import States
from trapo.models import agreement
from trapo.models.loading import head_of
from trapo.models.precision import compute_in
from trapo.models.sharding import as_forward, reshard
from trapo.rollouts import Rollout
from trapo.runs.ranks import ALONE, Ranks
from trapo_kernels.integrations.transformers import LinearHead

Reread = Callable[[Rollout], Rollout]  # the rollout as the teacher reads it


class ModelTeacher:
    """Reads rollouts with a model, which has no gradient. reread: the rollout with what stands before its response;
    None: as it is. budget: tokens of a forward, padding included. ranks: over which the model is sharded."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        precision: str,
        budget: int,
        pad_id: int,
        reread: Reread | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.precision, self.budget, self.pad_id = model, precision, budget, pad_id
        self.reread, self.ranks = reread, ranks

    def prepare(self, rollouts: Sequence[Rollout]) -> None:
        """Does nothing: a micro-batch's states are computed when it is its turn."""

    def rest(self) -> None:
        """Shards the head again, which is whole as long as the states are asked for."""
        reshard(self.model)

    @torch.no_grad()
    def know(self, rollouts: Sequence[Rollout]) -> States:
        """Returns the states [n, D'] of the tokens in the loss, rollout after rollout."""
        read = [self.reread(r) if self.reread else r for r in rollouts]
        parts: list[Sequence[int]] = list(micro_batches([len(r) for r in read], self.budget)) if read else []
        # Sharded weights are gathered by all ranks together: those with fewer forwards make some of a filler.
        parts += [[]] * (max(self.ranks.gather([max(len(parts), 1)])) - len(parts))
        found: dict[int, torch.Tensor] = {}
        for chosen in parts:
            batch = self._batch([read[i] for i in chosen])
            hidden, head = as_forward(self.model, functools.partial(self._states, batch))
            nothing = hidden[0, :0]
            for i, row in zip(chosen, batch.rows(hidden) if chosen else (), strict=True):
                found[i] = row[len(row) - loss_tokens(read[i]) :]
        return States(torch.cat([nothing, *(found[i] for i in range(len(read)))]), head)

    def _batch(self, read: Sequence[Rollout]) -> Batch:
        device = self.model.device
        return collate(read, self.pad_id, device) if read else filler(self.pad_id, device)

    def _states(self, batch: Batch) -> tuple[torch.Tensor, LinearHead]:
        with compute_in(self.precision, self.model):
            return head_of(self.model).with_hidden(agreement.hidden_states(self.model, batch.input_ids))


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
