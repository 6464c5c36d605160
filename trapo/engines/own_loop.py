"""This file decodes with a loop of our own around transformers' model code.

What it does that `generate` does not:

    cache       keys and values are written in place (columns.py); finished rows go, waiting requests take their place
    prompts     a context is prefilled once, and only what follows the longest beginning that is known, such as a system
                prompt, which all contexts of a call share (kept_prompts.py)
    sampling    one uniform number a row and token (inverse_cdf.py), from the row's own seed
    products    with weights that were packed once, where that is faster (packed_linears.py)

Attention, positions, masks and the head are the model's own: each step is one call of its forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from transformers import PreTrainedModel

from trapo.engines.columns import ColumnCache, Filled, tokens_in
from trapo.engines.inverse_cdf import Draws, greedy, sample
from trapo.engines.kept_prompts import Context, KeptPrompts
from trapo.engines.packed_linears import FEWEST, PackedLinears
from trapo.engines.prefill import prefill
from trapo.engines.protocol import Completion, Request
from trapo.engines.transformers_loop import cache_name
from trapo.engines.truncation import Support, Truncation
from trapo.engines.weight_marks import Mark
from trapo.models.prefix_tree import shared_beginning

KEPT_BYTES = 256 * 2**20  # of kept prompts: 5,800 tokens of SmolLM2-135M in float32
FEWEST_TOKENS = 16  # of a call, for which weights are packed: it takes some ten steps to pay
FREE_SHARE = 8  # rows are dropped, or filled again, when one in so many is free
SHORTEST_BEGINNING = 8  # tokens that all contexts of a call share, and that are computed by themselves
SPARE_COLUMNS = 32  # so that rows which are filled again do not move at every step


@dataclasses.dataclass(frozen=True)
class Settings:
    """Holds what is the same in a whole call."""

    temperature: float  # 0: greedy
    eos_ids: frozenset[int]
    rows: int  # at a time
    truncation: Truncation | None = None
    seen: dict[int, list[torch.Tensor]] | None = None  # by request: takes the logits [V] of each of its tokens


@dataclasses.dataclass
class Row:
    """Holds a request that is being decoded."""

    index: int  # of the request
    context: Context
    limit: int
    draws: Draws | None  # None: greedy
    tokens: list[int] = dataclasses.field(default_factory=list)
    supports: list[Support] = dataclasses.field(default_factory=list)  # of the tokens, where they are truncated
    ended: bool = False

    @property
    def done(self) -> bool:
        return self.ended or len(self.tokens) >= self.limit

    @property
    def last(self) -> int:
        return self.tokens[-1] if self.tokens else self.context[-1]

    @property
    def filled(self) -> int:
        """Returns the tokens whose keys and values are in the cache: all but the last."""
        return len(self.context) + len(self.tokens) - 1


class OwnLoop:
    """Decodes requests with a model, at most `batch_size` rows at a time. `eos_ids`: tokens that end a completion."""

    def __init__(self, model: PreTrainedModel, *, eos_ids: Sequence[int], pad_id: int, batch_size: int) -> None:
        self.model = model
        self.eos_ids, self.pad_id, self.batch_size = frozenset(eos_ids), pad_id, batch_size
        self.cache_name = cache_name(model)
        self.packed = PackedLinears(model)
        self.prompts = KeptPrompts(KEPT_BYTES)
        self.mark: Mark | None = None
        self.prefilled = 0  # tokens, since the loop was made

    def forget(self) -> None:
        """Drop all that was derived from the weights."""
        self.packed.clear()
        self.prompts.clear()
        self.mark = None

    def check_weights(self, mark: Mark) -> None:
        """Forget what was derived from other weights than those that have this mark."""
        if mark != self.mark:
            self.forget()
            self.mark = mark

    def decode(
        self,
        requests: Sequence[Request],
        *,
        temperature: float,
        seeds: Sequence[int],
        truncation: Truncation | None = None,
    ) -> list[Completion]:
        """Returns one completion per request, in their order. seeds: one per request."""
        if not requests:
            return []
        settings = Settings(temperature, self.eos_ids, min(self.batch_size, len(requests)), truncation)
        pays = max(r.max_new_tokens for r in requests) >= FEWEST_TOKENS
        with self.packed.in_place() if pays else nullcontext():
            return _Call(self, requests, seeds, settings).run()

    def probe(self, contexts: Sequence[Context], count: int) -> list[tuple[Context, list[int], torch.Tensor]]:
        """Returns (context, at most `count` greedy tokens, the logits [tokens, V] that chose them) of these contexts
        and of others that begin with them, with all that can go wrong on the way: rows that are dropped and filled
        again, contexts of which a beginning is known, packed weights."""
        found = []
        following = [(*a, *b[:n]) for n, (a, b) in enumerate(zip(contexts, reversed(contexts), strict=True), start=2)]
        with self.packed.in_place():
            for asked in (contexts, [*following, contexts[0]]):
                requests = [Request(c, count - i % 2, keep=True) for i, c in enumerate(asked)]
                seen: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(requests))}
                settings = Settings(0.0, frozenset(), min(FEWEST, len(requests)), seen=seen)
                completions = _Call(self, requests, [0] * len(requests), settings).run()
                found += [
                    (c, list(done.token_ids), torch.stack(seen[i]))
                    for i, (c, done) in enumerate(zip(asked, completions, strict=True))
                ]
        self.prompts.clear()
        return found

    def prefill(
        self, contexts: Sequence[Context], keep: Sequence[bool], beginning: Filled | None = None
    ) -> list[Filled]:
        """Returns keys and values of contexts, each of which is computed once. keep: those that later ones may begin
        with; beginning: what all of them begin with, where that is known."""
        needed = dict.fromkeys(contexts)
        known = [self.prompts.find(context) for context in needed]
        if beginning is not None:
            known = [k if k is not None and tokens_in(k) >= tokens_in(beginning) else beginning for k in known]
        self.prefilled += sum(map(len, needed)) - sum(0 if k is None else tokens_in(k) for k in known)
        filled = prefill(self.model, self.cache_name, list(needed), known, self.pad_id)
        found = dict(zip(needed, filled, strict=True))
        for context in {c for c, kept in zip(contexts, keep, strict=True) if kept}:
            self.prompts.add(context, found[context])
        return [found[context] for context in contexts]


class _Call:
    """Holds the state of one call of `decode`."""

    def __init__(self, loop: OwnLoop, requests: Sequence[Request], seeds: Sequence[int], settings: Settings) -> None:
        self.loop, self.requests, self.seeds, self.settings = loop, requests, seeds, settings
        self.device = loop.model.device
        # The longest come last and go first, so that rows need not move for one that comes later.
        self.waiting = sorted(range(len(requests)), key=lambda i: (len(requests[i].context), requests[i].context))
        columns = max(len(r.context) for r in requests) + max(r.max_new_tokens for r in requests)
        columns += SPARE_COLUMNS if settings.rows < len(requests) else 0
        self.cache = ColumnCache(loop.model.config, settings.rows, columns)
        self.beginning = self._common_beginning()
        self.rows: list[Row] = []
        self.completions: dict[int, Completion] = {}

    def run(self) -> list[Completion]:
        self._fill()
        while self.rows:
            logits = self._step()
            tokens, supports = self._choose(logits)
            for place, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
                if not row.done:
                    row.tokens.append(token)
                    row.supports += supports[place : place + 1]
                    row.ended = token in self.settings.eos_ids
            done = sum(row.done for row in self.rows)
            if done == len(self.rows) or done * FREE_SHARE >= len(self.rows):
                self._drop()
                self._fill()
        return [self.completions[i] for i in range(len(self.requests))]

    def _step(self) -> torch.Tensor:
        """Returns the logits [rows, V] of each row's next token; its last one is in the cache then."""
        if self.cache.length == self.cache.capacity:
            self._align(max(row.filled for row in self.rows))
        length = self.cache.length
        starts = [length - row.filled for row in self.rows]
        mask = None
        if any(starts):
            columns = torch.arange(length + 1, device=self.device)
            mask = (columns >= torch.tensor(starts, device=self.device)[:, None]).long()
        output = self.loop.model(
            input_ids=torch.tensor([[row.last] for row in self.rows], device=self.device),
            attention_mask=mask,
            position_ids=torch.tensor([[row.filled] for row in self.rows], device=self.device),
            use_cache=True,
            **{self.loop.cache_name: self.cache.cache},
        )
        logits: torch.Tensor = output.logits[:, -1]
        if self.settings.seen is not None:
            for row, scores in zip(self.rows, logits, strict=True):
                if not row.done:
                    self.settings.seen[row.index].append(scores.float())
        return logits

    def _choose(self, logits: torch.Tensor) -> tuple[list[int], list[Support]]:
        """Returns a token a row, and what each was sampled from: [] where that is the whole vocabulary."""
        if self.settings.temperature == 0:
            return greedy(logits).tolist(), []
        uniform = [0.0 if row.done or row.draws is None else row.draws.next() for row in self.rows]
        numbers = torch.tensor(uniform, dtype=torch.float64, device=self.device)
        if self.settings.truncation is not None:
            return self.settings.truncation.sample(logits, self.settings.temperature, numbers)
        return sample(logits, self.settings.temperature, numbers).tolist(), []

    def _drop(self) -> None:
        """Lets rows that are done leave; others take their places, so that those that stay are the first."""
        for row in self.rows:
            if row.done:
                supports = tuple(row.supports) or None
                self.completions[row.index] = Completion(tuple(row.tokens), finished=row.ended, supports=supports)
        staying = sum(not row.done for row in self.rows)
        free = [place for place, row in enumerate(self.rows[:staying]) if row.done]
        moves = [(place, free.pop()) for place in range(staying, len(self.rows)) if not self.rows[place].done]
        self.cache.move_rows(moves)
        for source, target in moves:
            self.rows[target] = self.rows[source]
        del self.rows[staying:]

    def _common_beginning(self) -> Filled | None:
        """Returns the keys and values of what all contexts begin with, such as a system prompt, if that is worth a
        forward."""
        contexts = [r.context[:-1] for r in self.requests]
        first, last = min(contexts), max(contexts)
        count = shared_beginning(first, last)
        if first == last or count < SHORTEST_BEGINNING:
            return None
        return self.loop.prefill([first[:count]], [False])[0]

    def _fill(self) -> None:
        """Puts waiting requests into the rows that are free."""
        taken = [self.waiting.pop() for _ in range(min(self.settings.rows - len(self.rows), len(self.waiting)))]
        if not taken:
            return
        requests = [self.requests[i] for i in taken]
        filled = self.loop.prefill([r.context[:-1] for r in requests], [r.keep for r in requests], self.beginning)
        longest = max(len(r.context) - 1 for r in requests)
        if self.rows:
            longest = max(longest, *(row.filled for row in self.rows))
        if self.cache.length < longest or self.cache.length - longest > self.cache.length // 4:
            self._align(longest)
        self.cache.load(filled, len(self.rows), self.cache.length)
        self.rows += [self._row(i) for i in taken]

    def _align(self, length: int) -> None:
        """Move all rows, so that they end before column `length`, which holds the longest."""
        if self.rows:
            widest = max(row.filled for row in self.rows)
            self.cache.move_columns(self.cache.length - widest, length, len(self.rows))
        else:
            self.cache.length = length

    def _row(self, index: int) -> Row:
        request = self.requests[index]
        draws = Draws(self.seeds[index]) if self.settings.temperature > 0 else None
        return Row(index, request.context, request.max_new_tokens, draws)
