"""The rollouts of a micro-batch become tensors: padded, packed or shared.

packed   one row of concatenated sequences, no padding; position ids start anew with each sequence, from which
         transformers makes cu_seqlens for varlen (flash) attention and a block-diagonal causal mask for the others
padded   one row a sequence, of about equal lengths, padding on the right: no token of a causal model sees what follows
         it, so that none needs a mask (with one, SDPA is slower and flash attention unpads and pads again)
shared   one row a tree of sequences that begin alike (models/prefix_tree.py); their hidden states are then laid end to
         end as in a packed row
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from trapo.models import prefix_tree
from trapo.rollouts import Rollout


@dataclasses.dataclass(frozen=True)
class Batch:
    """Holds a micro-batch of rollouts. Column t of a sequence holds the token that is fed in at t and the token
    (`targets`) that must be predicted from there: n = length of the rollout − 1.

    padded: B = rollouts, T = the largest n, padding on the right. packed: B = 1, T = sum of all n. shared: as packed,
    but input_ids and position_ids are rows [trees, width].
    """

    input_ids: torch.Tensor  # [B, T] int64
    position_ids: torch.Tensor | None  # [B, T] int64; None: padded
    targets: torch.Tensor  # [B, T] int64
    mask: torch.Tensor  # [B, T] bool: tokens in the loss (own tokens and supervised prefix tokens)
    expert_mask: torch.Tensor  # [B, T] bool: expert prefix tokens
    advantages: torch.Tensor  # [B] fp32; packed: [B, T]
    sequence_ids: torch.Tensor | None  # [B, T] int64: which rollout; None: padded, where rows say it
    lengths: tuple[int, ...]  # n of each rollout
    starts: torch.Tensor | None = None  # [rollouts + 1] int32: where each begins in a packed row, and its end
    sight: torch.Tensor | None = (
        None  # [trees, 1, width, width] bool: which tokens one of a tree sees; None: not shared
    )
    places: torch.Tensor | None = None  # [T] int64: of the sequences' tokens in the flattened rows of the trees

    @property
    def layout(self) -> dict[str, Any]:
        """Returns where the sequences of a packed row begin, in every way that transformers' layers are told: attention
        masks by positions, flash and linear attention by cu_seq_lens, state-space layers by seq_idx. {}: padded. What a
        tree is told by is `sight`."""
        if self.sequence_ids is None or self.sight is not None:
            return {}
        longest = max(self.lengths)
        return {
            "position_ids": self.position_ids,
            **{"cu_seq_lens_q": self.starts, "cu_seq_lens_k": self.starts},
            **{"max_length_q": longest, "max_length_k": longest},
            "seq_idx": self.sequence_ids.to(torch.int32),
        }

    def rows(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Returns values [B, T] as one [n] per rollout."""
        if self.sequence_ids is not None:
            return list(values[0].split(self.lengths))
        return [row[:n] for row, n in zip(values, self.lengths, strict=True)]

    def spread(self, rows: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Returns the inverse of `rows`, as fp32 [B, T]; zeros where there is None, and in padding."""
        device = self.targets.device
        there = any(row is not None and row.device.type != "cpu" for row in rows)  # else one copy for all of them
        values = torch.zeros(self.targets.shape, dtype=torch.float32, device=device if there else "cpu")
        for place, row in zip(self.rows(values), rows, strict=True):
            if row is not None:
                place.copy_(row)
        return values.to(device)


def collate(rollouts: Sequence[Rollout], pad_id: int, device: torch.device) -> Batch:
    """Pads and stacks rollouts."""
    lengths = tuple(len(r) - 1 for r in rollouts)
    shape = (len(rollouts), max(lengths))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    targets = torch.full(shape, pad_id, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    expert_mask = torch.zeros(shape, dtype=torch.bool)
    for row, (rollout, n) in enumerate(zip(rollouts, lengths, strict=True)):
        ids, mask[row, :n], expert_mask[row, :n] = _tokens(rollout)
        input_ids[row, :n], targets[row, :n] = ids[:-1], ids[1:]
    advantages = torch.tensor([r.advantage for r in rollouts], dtype=torch.float32)
    if any(r.prefix_advantages is not None for r in rollouts):
        advantages = torch.nn.utils.rnn.pad_sequence([_advantages(r) for r in rollouts], batch_first=True)
    batch = Batch(input_ids, None, targets, mask, expert_mask, advantages, None, lengths)
    return _to(batch, device)


def layout(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Returns `Batch.layout` of a packed row of sequences of these lengths."""
    places = _places(lengths)
    empty = torch.empty(0)
    batch = Batch(empty, places[0], empty, empty, empty, empty, places[1], tuple(lengths), places[2])
    return _to(batch, device).layout


def _places(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (position ids [1, T], sequence ids [1, T], starts [rollouts + 1]) of a packed row."""
    counts = torch.tensor(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return positions, torch.arange(len(lengths)).repeat_interleave(counts)[None], starts


def pack(rollouts: Sequence[Rollout], device: torch.device) -> Batch:
    """Concatenate rollouts into one row."""
    tokens = [_tokens(r) for r in rollouts]
    lengths = tuple(len(ids) - 1 for ids, _, _ in tokens)
    positions, sequence_ids, starts = _places(lengths)
    batch = Batch(
        input_ids=torch.cat([ids[:-1] for ids, _, _ in tokens])[None],
        position_ids=positions,
        targets=torch.cat([ids[1:] for ids, _, _ in tokens])[None],
        mask=torch.cat([mask for _, mask, _ in tokens])[None],
        expert_mask=torch.cat([expert for _, _, expert in tokens])[None],
        advantages=torch.cat([_advantages(r) for r in rollouts])[None],
        sequence_ids=sequence_ids,
        lengths=lengths,
        starts=starts,
    )
    return _to(batch, device)


def share(rollouts: Sequence[Rollout], trees: Sequence[int], pad_id: int, device: torch.device) -> Batch:
    """Returns the rollouts in the order of prefix_tree.grow, as trees of so many rollouts each."""
    tokens = [_tokens(r) for r in rollouts]
    sequences = iter([ids[:-1].tolist() for ids, _, _ in tokens])
    forest = prefix_tree.plant([[next(sequences) for _ in range(count)] for count in trees], pad_id)
    row = pack(rollouts, torch.device("cpu"))
    batch = dataclasses.replace(
        row,
        input_ids=forest.input_ids,
        position_ids=forest.position_ids,
        sight=forest.sight,
        places=forest.places,
    )
    return _to(batch, device)


def filler(pad_id: int, device: torch.device) -> Batch:
    """Returns a token that is in no loss: for a rank that has no rollout left while others still have some."""
    token = torch.full((1, 1), pad_id, dtype=torch.int64)
    none = torch.zeros(1, 1, dtype=torch.bool)
    return _to(Batch(token, None, token, none, none, torch.zeros(1), None, (1,)), device)


def target_logprobs(rollout: Rollout, name: str) -> torch.Tensor | None:
    """Returns a rollout's field of log-probabilities, one of each target, [len − 1] fp32; None where it has none.

    name: old_logprobs, ref_logprobs or rollout_logprobs, which are of its own tokens: 0 before them.
    """
    if name != "rollout_logprobs":
        return getattr(rollout, name)
    if rollout.rollout_logprobs is None:
        return None
    values = torch.zeros(len(rollout) - 1)
    values[len(values) - len(rollout.own_ids) :] = torch.tensor(rollout.rollout_logprobs)
    return values


def supports_of(batch: Batch, rollouts: Sequence[Rollout]) -> torch.Tensor | None:
    """Returns the ids that each target was sampled from, [B, T, K] int64, -1 for none; None where no rollout has
    some."""
    width = max((len(ids) for r in rollouts for ids in r.supports or ()), default=0)
    if width == 0:
        return None
    found = torch.full((*batch.targets.shape, width), -1, dtype=torch.int64)
    for rollout, row in zip(rollouts, batch.rows(found), strict=True):
        own = row[len(row) - len(rollout.own_ids) :]
        for place, ids in enumerate(rollout.supports or ()):
            own[place, : len(ids)] = torch.tensor(ids)
    return found.to(batch.targets.device, non_blocking=True)


def _advantages(rollout: Rollout) -> torch.Tensor:
    """Returns the advantage of each target [n] fp32."""
    # By way of fp64: torch refuses to fill with what is too large for fp32, and the loss is to say so itself.
    values = torch.full((len(rollout) - 1,), rollout.advantage, dtype=torch.float64).float()
    if rollout.prefix_advantages is not None:
        start = len(rollout.problem.prompt_ids) - 1
        values[start : start + len(rollout.prefix_ids)] = torch.tensor(rollout.prefix_advantages)
    return values


def _tokens(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (all ids [n + 1], mask [n], expert mask [n])."""
    ids = torch.tensor(rollout.problem.prompt_ids + rollout.response_ids)
    mask, expert_mask = torch.zeros(2, len(ids) - 1, dtype=torch.bool)
    # The first response token is the target of the prompt's last column.
    prefix_start = len(rollout.problem.prompt_ids) - 1
    own_start = prefix_start + len(rollout.prefix_ids)
    expert_mask[prefix_start:own_start] = True
    mask[prefix_start if rollout.supervised else own_start :] = True
    return ids, mask, expert_mask


def _to(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    tensors = {k: v for k, v in vars(batch).items() if torch.is_tensor(v)}
    return dataclasses.replace(batch, **one_copy(tensors, device))  # type: ignore[arg-type]


def one_copy(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Returns CPU tensors on a device, all in one copy, which nothing waits for: from pinned memory, as bytes."""
    widest_first = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each is aligned
    parts = [value.contiguous().flatten().view(torch.uint8) for _, value in widest_first]
    host = torch.empty(sum(map(len, parts)), dtype=torch.uint8, pin_memory=device.type == "cuda")
    moved = torch.cat(parts, out=host).to(device, non_blocking=True).split([len(part) for part in parts])
    return {
        name: part.view(value.dtype).view(value.shape) for (name, value), part in zip(widest_first, moved, strict=True)
    }
