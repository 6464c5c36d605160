"""From rollouts to tensors: length-bucketed micro-batches under a token budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from trapo.collect import Rollout
from trapo.errors import TrapoError


@dataclasses.dataclass(frozen=True)
class Batch:
    """A micro-batch of rollouts, padded on the right. Column t holds the token that is fed in at t and the token
    (`targets`) that must be predicted from there; B rollouts, T = longest rollout − 1."""

    input_ids: torch.Tensor  # [B, T] int64
    attention_mask: torch.Tensor  # [B, T] int64
    targets: torch.Tensor  # [B, T] int64
    mask: torch.Tensor  # [B, T] bool: tokens in the loss (own tokens and supervised prefix tokens)
    expert_mask: torch.Tensor  # [B, T] bool: expert prefix tokens
    advantages: torch.Tensor  # [B] fp32


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices grouped so that (longest length × count) stays within the budget; a longer one goes alone.

    Sorted by length, so that little is padding; longest first, so that a memory limit shows at once.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def collate(rollouts: Sequence[Rollout], pad_id: int, device: torch.device) -> Batch:
    """Pad and stack rollouts."""
    width = max(len(r) for r in rollouts) - 1
    shape = (len(rollouts), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    targets = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    expert_mask = torch.zeros(shape, dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        ids = torch.tensor(rollout.problem.prompt_ids + rollout.response_ids)
        n = len(ids) - 1
        input_ids[row, :n], targets[row, :n], attention_mask[row, :n] = ids[:-1], ids[1:], 1
        # The first response token is the target of the prompt's last column.
        prefix_start = len(rollout.problem.prompt_ids) - 1
        own_start = prefix_start + len(rollout.prefix_ids)
        expert_mask[row, prefix_start:own_start] = True
        mask[row, prefix_start if rollout.supervised else own_start : n] = True
    advantages = torch.tensor([r.advantage for r in rollouts], dtype=torch.float32)
    batch = (input_ids, attention_mask, targets, mask, expert_mask, advantages)
    return Batch(*(t.to(device, non_blocking=True) for t in batch))


def loss_tokens(rollout: Rollout) -> int:
    """How many of a rollout's tokens are in the loss: the share it adds to the token normaliser."""
    return len(rollout.own_ids) + (len(rollout.prefix_ids) if rollout.supervised else 0)


def sampled_logprobs(rollout: Rollout) -> torch.Tensor:
    """The engine's logprobs of a rollout's targets, [len − 1] fp32; 0 before its own tokens."""
    if rollout.own_logprobs is None:
        raise TrapoError(
            "objective.tis_cap: the engine gave no log-probabilities; accepted rollout.engine: vllm, vllm_server"
        )
    values = torch.zeros(len(rollout) - 1)
    values[len(values) - len(rollout.own_ids) :] = torch.tensor(rollout.own_logprobs)
    return values
