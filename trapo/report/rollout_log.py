"""The file rollouts.jsonl has all rollouts of a few prompts of some steps, as text (`trapo report` shows them)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trapo.data.encode import decode_text
from trapo.data.problem import prompt_text
from trapo.rollouts import Rollout
from trapo.runs.ranks import ALONE, Ranks
from trapo.runs.run_dir import append_rows
from trapo.settings.groups import LogConfig


class RolloutLog:
    """Writes the file of a run. Of several ranks the first one writes, and all must call it."""

    def __init__(self, log: LogConfig, path: Path, tokenizer: PreTrainedTokenizerBase, ranks: Ranks = ALONE) -> None:
        self.log, self.path, self.tokenizer, self.ranks = log, path, tokenizer, ranks

    def note(self, step: int, rollouts: Sequence[Rollout], *, scored: bool, seed: int) -> None:
        """Write a sample of a step's rollouts, every log.rollouts_every steps. step: counted from 0."""
        if not self.log.rollouts_every or step % self.log.rollouts_every:
            return

        def write() -> None:
            chosen = sample_rollouts(rollouts, self.log.rollouts, seed)
            append_rows(self.path, [rollout_row(step + 1, r, self.tokenizer, scored=scored) for r in chosen])

        self.ranks.once(write)


def sample_rollouts(rollouts: Sequence[Rollout], count: int, seed: int) -> list[Rollout]:
    """Returns all rollouts of some of a step's prompts: of as many prompts as make `count` rollouts, at least one.

    Prompts are taken in turns by how many of their rollouts are guided, so that all kinds are seen.
    """
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    by_guidance: dict[int, list[list[Rollout]]] = {}
    for group in random.Random(seed).sample(list(groups.values()), len(groups)):
        by_guidance.setdefault(sum(r.guided for r in group), []).append(group)
    turns = sorted((turn, -kind) for kind, found in by_guidance.items() for turn in range(len(found)))
    chosen: list[Rollout] = []
    for turn, kind in turns:
        if len(chosen) >= count:
            break
        chosen += by_guidance[-kind][turn]
    return chosen


def rollout_row(step: int, rollout: Rollout, tokenizer: PreTrainedTokenizerBase, *, scored: bool) -> dict[str, Any]:
    """Returns a line of rollouts.jsonl. step: as in metrics.jsonl, counted from 1."""
    problem = rollout.problem.problem
    prefix, own = _split_text(rollout, tokenizer)
    return {
        "step": step,
        "id": problem.id,
        "group": rollout.group,
        "prompt": prompt_text(problem),
        "answer": problem.answer,
        "prefix": prefix,
        "own": own,
        "prefix_tokens": len(rollout.prefix_ids),
        "own_tokens": len(rollout.own_ids),
        "level": rollout.level,
        "ratio": rollout.ratio,
        "supervised": rollout.supervised,
        "finished": rollout.finished,
        "reward": rollout.reward if scored else None,
        "status": rollout.status,
        "detail": rollout.detail,
        "advantage": rollout.advantage if scored else None,
    }


def _split_text(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Returns the texts of prefix and own tokens. Own text is what the whole has beyond the prefix: decoders may drop a
    blank at the start of a text."""
    whole, prefix = decode_text(tokenizer, rollout.response_ids), decode_text(tokenizer, rollout.prefix_ids)
    if whole.startswith(prefix):
        return prefix, whole[len(prefix) :]
    return prefix, decode_text(tokenizer, rollout.own_ids)  # a character whose bytes lie on both sides
