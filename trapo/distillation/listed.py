"""This file has teachers that are known on a few ids of each token: columns of the data, and a server that gives
`prompt_logprobs`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from trapo.batching import loss_tokens
from trapo.data.encode import EncodedProblem
from trapo.data.problem import DataError
from trapo.distillation.known import TopK
from trapo.engines.http_server import Server
from trapo.engines.vllm_server import COMPLETIONS, name_of_model
from trapo.errors import TrapoError
from trapo.rollouts import Rollout
from trapo.runs.ranks import ALONE, Ranks

IDS, LOGPROBS = "topk_ids", "topk_logprobs"  # columns
AT_ONCE = 32  # requests in flight

Row = list[tuple[int, float]]  # the ids of a token with their log-probabilities


class ColumnTeacher:
    """Knows a top-k of each token of each problem's only trace, from the columns topk_ids and topk_logprobs: a list of
    lists each, one a token, in the order of the trace's tokens; for its end, there may be none."""

    def __init__(self, problems: Sequence[EncodedProblem], vocab: int) -> None:
        self._known = {problem.name: _of_columns(problem, vocab) for problem in problems}

    def prepare(self, rollouts: Sequence[Rollout]) -> None:
        """Does nothing: all is known."""

    def rest(self) -> None:
        """Does nothing: it stays known."""

    def know(self, rollouts: Sequence[Rollout]) -> TopK:
        return as_tensors([row for rollout in rollouts for row in self._known[rollout.problem.name]])


class ServerTeacher:
    """Asks a `vllm serve` for its `prompt_logprobs` of rollouts, before the update on them. Ranks share the asking.

    Raises TrapoError, one line, for a server that does not answer, or answers something else.
    """

    def __init__(self, url: str, *, top_k: int, vocab: int, ranks: Ranks = ALONE) -> None:
        self.server = Server(url, key="distill.teacher")
        self.top_k, self.vocab, self.ranks = top_k, vocab, ranks
        self.name = name_of_model(self.server)
        self._known: dict[tuple[int, ...], list[Row]] = {}  # by the ids of the whole sequence

    def prepare(self, rollouts: Sequence[Rollout]) -> None:
        """Asks for the rollouts of an update, of which `know` is asked then."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(self._ask, self.ranks.share(rollouts)))
        self._known = dict(zip(map(_sequence, rollouts), self.ranks.gather(answers), strict=True))

    def rest(self) -> None:
        """Does nothing: what it knows of the rollouts is asked for after their update, too."""

    def know(self, rollouts: Sequence[Rollout]) -> TopK:
        return as_tensors([row for rollout in rollouts for row in self._known[_sequence(rollout)]])

    def _ask(self, rollout: Rollout) -> list[Row]:
        ids = list(_sequence(rollout))
        answer = self.server.post(
            COMPLETIONS,
            {
                "model": self.name,
                "prompt": ids,
                "add_special_tokens": False,
                "max_tokens": 1,  # there is no way to ask for none
                "temperature": 0.0,
                "prompt_logprobs": self.top_k,
                "return_tokens_as_token_ids": True,
            },
        )
        try:
            return rows_of(answer, len(ids), self.vocab)[len(ids) - loss_tokens(rollout) :]
        except ValueError as error:
            raise self.server.wrong(COMPLETIONS, str(error)) from None


def _sequence(rollout: Rollout) -> tuple[int, ...]:
    return (*rollout.problem.prompt_ids, *rollout.response_ids)


def rows_of(answer: Any, count: int, vocab: int) -> list[Row]:
    """Returns what a server's answer says of each token of the prompt; of the first it says nothing.

    Raises ValueError, one line, where that is not a mapping of ids of the vocabulary to log-probabilities.
    """
    try:
        given = answer["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"no choice with prompt_logprobs, but {answer!r:.80}") from None
    if not isinstance(given, list) or len(given) != count:
        raise ValueError(f"prompt_logprobs must be a list of {count}; got {given!r:.80}")
    rows: list[Row] = []
    for place, entry in enumerate(given):
        if entry is None and place == 0:
            rows.append([])
            continue
        if not isinstance(entry, Mapping) or not entry:
            raise ValueError(f"prompt_logprobs must map ids of token {place} to log-probabilities; got {entry!r:.80}")
        try:
            row = [(int(token), float(value["logprob"])) for token, value in entry.items()]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"prompt_logprobs must hold ids with a logprob each; got {entry!r:.80}") from None
        if reason := _wrong(row, vocab):
            raise ValueError(reason)
        rows.append(row)
    return rows


def as_tensors(rows: Sequence[Row]) -> TopK:
    """Returns rows of different lengths as one [n, K], on the CPU."""
    width = max(map(len, rows), default=0)
    ids = torch.full((len(rows), width), -1, dtype=torch.int64)
    logprobs = torch.full((len(rows), width), -math.inf)
    for place, row in enumerate(rows):
        if row:
            ids[place, : len(row)] = torch.tensor([token for token, _ in row])
            logprobs[place, : len(row)] = torch.tensor([value for _, value in row])
    return TopK(ids, logprobs)


def _of_columns(encoded: EncodedProblem, vocab: int) -> list[Row]:
    """Returns the top-k of each token of the problem's trace. Raises DataError for columns that do not say it."""
    where = f"data.train: {encoded.name}:"
    if len(encoded.problem.traces) != 1:
        raise DataError(
            f"{where} columns '{IDS}' and '{LOGPROBS}' are of one trace; got {len(encoded.problem.traces)} traces"
        )
    found = [encoded.problem.row.get(name) for name in (IDS, LOGPROBS)]
    count = len(encoded.traces[0].token_ids)
    for name, lists in zip((IDS, LOGPROBS), found, strict=True):
        if not isinstance(lists, Sequence) or not all(
            isinstance(x, Sequence) and not isinstance(x, str) for x in lists
        ):
            raise DataError(f"{where} column '{name}' must be a list of lists, one a token; got {lists!r:.80}")
        if len(lists) not in (count, count - 1):
            raise DataError(
                f"{where} column '{name}' must have {count} lists, one for each token of the trace by this model's "
                f"tokenizer and its end, or {count - 1}, without the end; got {len(lists)}"
            )
    rows: list[Row] = []
    for place, (tokens, values) in enumerate(zip(*found, strict=False)):
        if len(tokens) != len(values):
            raise DataError(f"{where} token {place} has {len(tokens)} '{IDS}' and {len(values)} '{LOGPROBS}'")
        try:
            row = [(_whole(token), float(value)) for token, value in zip(tokens, values, strict=True)]
        except (TypeError, ValueError):
            raise DataError(f"{where} token {place}: ids and log-probabilities must be numbers") from None
        if reason := _wrong(row, vocab):
            raise DataError(f"{where} token {place}: {reason}")
        rows.append(row)
    return rows + [[]] * (count - len(rows))


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError
    return int(value)


def _wrong(row: Row, vocab: int) -> str | None:
    """Returns what is wrong with a token's top-k."""
    for token, value in row:
        if not -1 <= token < vocab:
            return f"ids must be from 0 to {vocab - 1}, or -1; got {token}"
        if math.isnan(value) or value > 1e-3:  # rounding may leave a certain token a little above 0
            return f"log-probabilities must be at most 0; got {value}"
    if sum(math.exp(value) for token, value in row if token >= 0) > 1.01:
        return "the probabilities of different ids must not be above 1 in sum"
    return None


def refuse_temperature(temperature: float) -> None:
    """Raises TrapoError for a temperature at which a top-k is not known."""
    if temperature != 1:
        raise TrapoError(
            f"rollout.temperature: got {temperature:g}; a teacher's top-k is of temperature 1, which its student must "
            "have; a model as distill.teacher takes any"
        )
