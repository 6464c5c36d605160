"""This file measures how likely a model finds texts that it did not write: held-out expert traces, and what the base
model knew before."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

import trapo_kernels as tk
from trapo.batching import micro_batches
from trapo.data.encode import EncodedProblem
from trapo.models import agreement
from trapo.models.loading import head_of
from trapo.models.precision import compute_in
from trapo.models.sharding import as_forward
from trapo.runs.ranks import ALONE, Ranks

IGNORED = -100
TOKENS = 4096  # of a forward


class Likelihood(NamedTuple):
    """Holds the mean negative log-likelihood of a token, in nats at temperature 1, and over how many tokens it is."""

    nll: float
    tokens: int


def trace_likelihood(
    model: PreTrainedModel, problems: Sequence[EncodedProblem], precision: str, ranks: Ranks = ALONE
) -> Likelihood | None:
    """Returns the likelihood of all expert traces of these problems, their ends included; None where there is none.

    precision: a value of train.precision. ranks: split the work, and each gets the result.
    """
    pairs = [(p.prompt_ids, trace.token_ids) for p in problems for trace in p.traces]
    return likelihood(model, pairs, precision, ranks)


@torch.no_grad()
def likelihood(
    model: PreTrainedModel,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    precision: str,
    ranks: Ranks = ALONE,
) -> Likelihood | None:
    """Returns the likelihood of (given token ids, token ids that follow) pairs, of the latter; None where there is no
    pair. The first token of all has nothing before it, and does not count."""
    rows = [([*given, *ids], max(len(given), 1)) for given, ids in sequences]
    rows = [(ids, start) for ids, start in rows if len(ids) > start]
    if not rows:
        return None
    parts = micro_batches([len(ids) - 1 for ids, _ in rows], TOKENS)
    sums: list[tuple[int, float, int]] = []  # of a micro-batch: its place, Σ log-probabilities, tokens
    for place in ranks.deal(range(len(parts)), -1):
        # Sharded weights are gathered by all ranks together: one that has nothing left to do computes something.
        inputs, targets = _padded([rows[i] for i in parts[max(place, 0)]], model.device)
        logprobs = as_forward(model, functools.partial(_logprobs, model, inputs, targets, precision))
        if place >= 0:
            sums.append((place, float(logprobs.double().sum()), int((targets != IGNORED).sum())))
    found = sorted(ranks.gather(sums))  # in the order of one rank, so that rounding is its, too
    count = sum(tokens for *_, tokens in found)
    return Likelihood(-sum(total for _, total, _ in found) / count, count)


def _padded(rows: Sequence[tuple[list[int], int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (what is fed in, what must be predicted) [rows, longest − 1]; padding on the right, where no token of a
    causal model sees it."""
    longest = max(len(ids) for ids, _ in rows) - 1
    inputs = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    for i, (ids, start) in enumerate(rows):
        inputs[i, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[i, start - 1 : len(ids) - 1] = torch.tensor(ids[start:])
    return inputs.to(device), targets.to(device)


def _logprobs(model: PreTrainedModel, inputs: torch.Tensor, targets: torch.Tensor, precision: str) -> torch.Tensor:
    with compute_in(precision, model):
        hidden, head = head_of(model).with_hidden(agreement.hidden_states(model, inputs))
    return tk.linear_logprobs(hidden, head.weight, targets, **head.options).logprobs
